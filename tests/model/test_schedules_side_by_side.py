"""Schedules of one run side by side, through the command line: nothing overwritten, nothing combined."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from pruning_runtime import Schedule
from schedule_finder.evidence import HeldOutSummary, digest
from schedule_finder.run.stale import example_digest, figure_digest
from tests.support.command_line import call
from tests.support.tiny_folder import write_jsonl, write_llava_folder

PAPER, PYRAMID = "40pct-processed-paper", "40pct-processed-pyramid"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose selected schedule is `PAPER`; not to be changed."""
    folder = tmp_path_factory.mktemp("side-by-side")
    checkpoint, data = write_llava_folder(folder / "llava"), write_jsonl(folder / "data", 16, square=True)
    call(
        "run", checkpoint, "--dataset", data, "--samples", 10, "--eval-samples", 6, "--out", folder / "run",
        "--solver", "paper", "--budget", "40%", "--max-new-tokens", 2, "--baselines", "random",
    )  # fmt: skip
    return folder / "run"


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> Path:
    return shutil.copytree(evaluated, tmp_path / "run")


def kept(run: Path) -> dict[str, str]:
    return {path.stem: digest(Schedule.load(path)) for path in (run / "4_schedules").glob("*.json")}


def selected(run: Path) -> Schedule:
    return Schedule.load(run / "4_schedule.json")


def test_every_solve_is_kept_and_the_last_is_selected(run: Path) -> None:
    first = kept(run)
    assert set(first) == {PAPER}
    found = call("schedule", run, "--solver", "pyramid", "--budget", "40%")
    assert found["name"] == PYRAMID
    assert kept(run) == first | {PYRAMID: digest(selected(run))}
    assert first[PAPER] != digest(selected(run))
    assert selected(run).provenance["name"] == PYRAMID
    # The same search again is the same result.
    call("schedule", run, "--solver", "paper", "--budget", "40%")
    assert set(kept(run)) == {PAPER, PYRAMID}
    assert selected(run).provenance["name"] == PAPER


def test_another_result_of_the_same_name_gets_a_number(run: Path) -> None:
    path = run / "4_schedules" / f"{PAPER}.json"
    edited = Schedule.load(path).model_copy(update={"positions": "renumbered"})
    edited.save(path)
    edited.save(run / "4_schedule.json")
    call("schedule", run, "--solver", "paper", "--budget", "40%")
    assert kept(run) == {PAPER: digest(edited), f"{PAPER}-2": digest(selected(run))}
    assert digest(edited) != digest(selected(run))


def test_an_edited_or_older_selected_schedule_is_kept_before_it_is_replaced(run: Path) -> None:
    shutil.rmtree(run / "4_schedules")
    edited = selected(run).model_copy(update={"positions": "renumbered", "provenance": {}})
    edited.save(run / "4_schedule.json")
    call("schedule", run, "--solver", "pyramid", "--budget", "40%")
    assert kept(run) == {PAPER: digest(edited), PYRAMID: digest(selected(run))}


def test_names_copies_and_selection(run: Path, tmp_path: Path) -> None:
    asked = ("schedule", run, "--solver", "pyramid", "--budget", "40%")
    copy = tmp_path / "copy.json"
    assert call(*asked, "--name", "mine", "--out", copy)["name"] == "mine"
    assert digest(Schedule.load(copy)) == kept(run)["mine"]
    before = kept(run)
    assert "--name 'mine'" in call(*asked, "--name", "mine", code=2)
    assert f"--out {copy}: exists" in call(*asked, "--out", copy, code=2)
    assert "--name '../x'" in call(*asked, "--name", "../x", code=2)
    assert "--name 'random'" in call(*asked, "--name", "random", code=2)
    assert "--select 'none': no schedule of that name" in call("schedule", run, "--select", "none", code=2)
    assert kept(run) == before
    assert call("schedule", run, "--select", PAPER)["name"] == PAPER
    assert digest(selected(run)) == before[PAPER]


def test_results_carry_the_digest_of_their_schedule(run: Path) -> None:
    mine = digest(selected(run))
    table = pd.read_csv(run / "5_evaluation.csv")
    pruned = table[table.method != "full"]
    assert set(pruned.digest) == {mine}
    assert set(pruned.schedule) == {PAPER}
    assert example_digest(run / "5_example.json") == mine
    for name in ("4_schedule", "5_accuracy", "6_overlay"):
        assert figure_digest(run / "6_figures" / f"{name}.png") == mine
        assert mine.encode() in (run / "6_figures" / f"{name}.pdf").read_bytes()
    assert call("inspect", run)["stale"] == []


def test_what_belongs_to_another_schedule_is_marked_and_never_drawn_with_it(run: Path) -> None:
    old = digest(selected(run))
    found = call("schedule", run, "--solver", "pyramid", "--budget", "40%")
    files = {name for stale in found["stale"] for name in stale["files"]}
    assert {"5_evaluation.csv", "5_example.json", "6_figures/4_schedule", "6_figures/5_accuracy"} <= files
    assert {stale["renew"].split()[1] for stale in found["stale"]} == {"evaluate", "plot"}
    assert call("inspect", run)["stale"] == found["stale"]

    left = call("plot", run)["stale"]
    assert {name for stale in left for name in stale["files"]} == {"5_evaluation.csv", "5_example.json"}
    drawn = {path.stem: figure_digest(path) for path in (run / "6_figures").glob("*.png")}
    assert drawn["4_schedule"] == digest(selected(run))
    assert old not in drawn.values()
    assert "5_accuracy" not in drawn
    assert "6_overlay" not in drawn

    assert call("evaluate", run, "--max-new-tokens", 2, "--baselines", "none")["stale"] == []
    call("plot", run)
    assert figure_digest(run / "6_figures" / "5_accuracy.png") == digest(selected(run))


def test_schedules_are_evaluated_beside_each_other(run: Path, tmp_path: Path) -> None:
    call("schedule", run, "--solver", "pyramid", "--budget", "60%", "--name", "mild")
    copy = tmp_path / "random.json"
    shutil.copy(run / "4_schedules" / f"{PAPER}.json", copy)
    found = call(
        "evaluate", run, "--schedule", PAPER, "--schedule", "mild", "--schedule", copy,
        "--eval-samples", 2, "--max-new-tokens", 2, "--baselines", "random",
    )  # fmt: skip
    rows = [row for row in found["rows"] if row["question_type"] == "all"]
    assert [(row["method"], row["schedule"]) for row in rows] == [
        ("full", None),
        (PAPER, PAPER), ("random", PAPER),
        ("mild", "mild"), ("random", "mild"),
        ("random-2", "random-2"), ("random", "random-2"),
    ]  # fmt: skip
    assert {row["n"] for row in rows} == {2}
    processed = {(row["method"], row["schedule"]): row["processed"] for row in rows}
    for name in (PAPER, "mild"):
        assert processed[name, name] == processed["random", name]
    assert processed["mild", "mild"] > processed[PAPER, PAPER] + 0.1
    numbers = {(row["method"], row["schedule"]): row["kl"] for row in rows}
    assert numbers["random-2", "random-2"] == numbers[PAPER, PAPER]

    # The figures are those of the selected schedule.
    call("plot", run)
    shown = pd.read_csv(run / "6_figures" / "5_accuracy.csv")
    assert set(shown.method) == {"full", "schedule", "random"}
    assert shown[shown.method == "schedule"].processed.tolist() == pytest.approx(
        [processed["mild", "mild"]], abs=1e-6
    )
    summary = HeldOutSummary.load(run / "5_evaluation.json")
    assert summary is not None
    assert (summary.name, summary.schedule) == ("mild", digest(selected(run)))
    assert [other.name for other in summary.others] == [PAPER, "random-2"]

    assert "holds out 6 samples" in call("evaluate", run, "--eval-samples", 7, code=2)
    line = call("evaluate", run, "--schedule", "nothing", code=2)
    assert f"there: {PAPER}, mild" in line


def test_inspect_and_run_give_the_numbers(run: Path) -> None:
    found = call("inspect", run)
    table = pd.read_csv(run / "5_evaluation.csv")
    assert [row["kl"] for row in found["evaluation"]] == table.kl.tolist()
    assert found["schedule"]["stages"] == json.loads((run / "4_schedule.json").read_text())["stages"]
    assert (found["selected"], list(found["schedules"])) == (PAPER, [PAPER])
    points = json.loads((run / "3_change_points.json").read_text())
    assert found["detector"] == points["default"]
    assert found["change_points"] == {
        name: entry["change_points"] for name, entry in points["detectors"].items()
    }
