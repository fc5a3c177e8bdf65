"""What an evaluation compares, under which policy, at what cost; on a checkpoint and data made elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pruning_runtime import Schedule
from pruning_runtime.schedule import ScorerChoice
from schedule_finder.cli.commands import app
from schedule_finder.evaluation.evaluate import Evaluation
from schedule_finder.evaluation.methods import BASELINES, SWEEP, Method
from schedule_finder.measuring.unit_store import UnitStore
from schedule_finder.models.loading import load_backbone
from schedule_finder.samples import open_data, read_entries
from tests.support.command_line import call, runner
from tests.support.tiny_folder import write_jsonl, write_llava_folder

HELD_OUT = 6


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a schedule for another policy than the default one; not to be changed."""
    folder = tmp_path_factory.mktemp("evaluated")
    data, out = write_jsonl(folder / "data", 30), folder / "run"
    asked = ("--samples", 16, "--eval-samples", HELD_OUT, "--out", out)
    call("profile", write_llava_folder(folder / "llava"), "--dataset", data, *asked)
    call("detect", out)
    policy = ("--scorer", "last_token", "--dropped-tokens", "discard")
    call("schedule", out, "--solver", "sensitivity", "--budget", "40%", *policy)
    return out


@pytest.fixture
def run(scheduled: Path, tmp_path: Path) -> Path:
    """A copy of `scheduled`."""
    return shutil.copytree(scheduled, tmp_path / "run")


def evaluated(run: Path, *options: object) -> pd.DataFrame:
    call("evaluate", run, "--max-new-tokens", 2, *options)
    table = pd.read_csv(run / "5_evaluation.csv")
    return table[table.question_type == "all"]


def test_the_default_is_the_schedule_and_three_baselines_at_its_budget(run: Path) -> None:
    table = evaluated(run)
    # The schedule scores by the last token, so the paper's rule is the third.
    assert table.method.tolist() == ["full", "schedule", "random", "strided", "text_guided"]
    assert table.budget.tolist() == pytest.approx([1.0] + [0.4] * 4)


def test_schedules_of_the_sweep_are_searched_with_the_users_policy(run: Path) -> None:
    """The table that the schedule was made from is gone: only what the user asked for says what to measure."""
    (run / "4_sensitivity.parquet").unlink()
    table = evaluated(run, "--baselines", "none", "--sweep")
    schedules = table[table.method == "schedule"]
    assert schedules.budget.tolist() == pytest.approx([0.4, *SWEEP])
    assert set(schedules.scorer) == {"last_token"}
    assert set(schedules.dropped_tokens) == {"discard"}
    measured = pd.read_parquet(run / "4_sensitivity.parquet")
    assert (set(measured.scorer), set(measured.dropped_tokens)) == ({"last_token"}, {"discard"})
    assert "not merged" not in set(table.method)  # nothing is merged


def test_every_baseline_by_name(run: Path) -> None:
    table = evaluated(run, "--baselines", "all").set_index("method")
    found = {name.replace(" ", "-") for name in table.index} - {"full", "schedule"}
    # LLaVA makes as many tokens of any image, nothing is merged, and the schedule is itself of the last token. Rules of
    # videos are refused on a single image, in the first forward.
    assert found == set(BASELINES) - {"smaller-images", "not-merged", "last_token", "evs", "vidcom2"}
    others = table.loc[["paper", "pyramid", "random layers"]]
    assert set(others.scorer) == {"last_token"}
    assert set(others.dropped_tokens) == {"discard"}
    assert evaluated(run, "--baselines", "strided,paper").method.tolist() == [
        "full", "schedule", "strided", "paper",
    ]  # fmt: skip


def test_a_baseline_that_does_not_apply_is_named(run: Path) -> None:
    result = runner.invoke(app, ["evaluate", str(run), "--max-new-tokens", "2", "--baselines", "strided,evs"])
    assert result.exit_code == 0, result.stderr
    assert "do not allow it: evs (baselines of " in result.stderr


def test_figures_of_an_earlier_evaluation_are_removed(run: Path) -> None:
    evaluated(run, "--baselines", "none")
    call("plot", run)
    drawn = {path.stem for path in (run / "6_figures").iterdir()}
    assert {"4_sensitivity", "5_accuracy"} <= drawn
    result = runner.invoke(app, ["evaluate", str(run), "--max-new-tokens", "2", "--eval-samples", "3"])
    assert result.exit_code == 0, result.stderr
    assert "figures of an earlier evaluation are removed; draw them with" in result.stderr
    left = {path.stem for path in (run / "6_figures").iterdir()}
    assert left == {name for name in drawn if not name.startswith("5_")} - {"4_pareto", "6_overlay"}


def test_an_unknown_baseline_is_one_line_before_anything_runs(run: Path) -> None:
    line = call("evaluate", run, "--baselines", "strided,magic", code=2)
    assert "--baselines 'magic': choose all, none, or some of random, strided" in line
    assert not (run / "5_evaluation.csv").exists()


def test_a_folder_in_the_place_of_the_table_is_refused_before_any_answer(run: Path) -> None:
    (run / "5_evaluation.csv").mkdir()
    assert "5_evaluation.csv: is a folder" in call("evaluate", run, "--baselines", "none", code=2)
    assert not (run / "5_answers.parquet").exists()


def test_evaluation_leaves_the_schedule_file_alone_and_inspect_shows_both(run: Path) -> None:
    before = (run / "4_schedule.json").read_bytes()
    table = evaluated(run).set_index("method")
    assert (run / "4_schedule.json").read_bytes() == before
    assert not (run / "5_evaluation.parts").exists()
    summary = json.loads((run / "5_evaluation.json").read_text())
    assert list(summary["methods"]) == list(table.index)
    for name, result in summary["methods"].items():
        assert result["n"] == HELD_OUT
        assert result["exact_match"] == pytest.approx(table.exact_match[name], abs=1e-6)
        assert result["kl"] == pytest.approx(table.kl[name], abs=1e-5)
    for what in (run, run / "4_schedule.json"):
        said = runner.invoke(app, ["inspect", str(what)], env={"COLUMNS": "100"}).stdout
        assert f"n = {HELD_OUT}" in said
        assert f"full model {100 * table.exact_match['full']:.1f} %" in said
    # Another schedule has no evaluation yet.
    call("schedule", run, "--budget", "60%", "--solver", "pyramid")
    said = runner.invoke(app, ["inspect", str(run)], env={"COLUMNS": "100"}).stdout
    assert "evaluate again" in said


def test_the_number_of_answers_and_the_expected_time_are_stated_before_the_baselines(run: Path) -> None:
    result = runner.invoke(app, ["evaluate", str(run), "--max-new-tokens", "1", "--batch-size", "4"])
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stderr.splitlines()]
    (number,) = [line for line in lines if "generated answers" in line]
    assert f"7 methods x {HELD_OUT} samples = {7 * HELD_OUT} generated answers" in number
    (expected,) = [line for line in lines if "expected time" in line]
    assert f"for {7 * HELD_OUT} answers" in expected  # none was there when it was said
    assert lines.index(number) < lines.index(expected)


def test_a_schedule_of_before_is_evaluated_with_what_its_solver_chooses(run: Path) -> None:
    """Files of earlier releases do not say what was asked for."""
    schedule = Schedule.load(run / "4_schedule.json")
    evidence = {name: value for name, value in schedule.evidence.items() if name != "asked"}
    schedule.model_copy(update={"evidence": evidence}).save(run / "4_schedule.json")
    table = evaluated(run, "--baselines", "paper")
    assert table.method.tolist() == ["full", "schedule", "paper"]


def test_units_of_an_interrupted_evaluation_are_those_of_an_uninterrupted_one(
    run: Path, tmp_path: Path
) -> None:
    """Half of the batches are stored, under other settings too: each is taken for what it is."""
    options = json.loads((run / "run.json").read_text())["options"]
    loaded, data = load_backbone(options["backbone"], device="cpu"), open_data(options["dataset"])
    entries = [entry for entry in read_entries(run / "1_samples.jsonl") if entry.use == "held_out"]
    samples = [data.load(entry) for entry in entries]
    schedule = Schedule.load(run / "4_schedule.json")
    other = schedule.model_copy(update={"dropped_tokens": "merge"})
    methods = [
        Method("schedule", schedule, 0.4),
        Method("merge", other, 0.4),
        Method("random", schedule.model_copy(update={"scorer": ScorerChoice(name="random")}), 0.4),
        Method("small", schedule.model_copy(update={"stages": ()}), 0.4, image_scale=0.5),
    ]

    def table(folder: Path | None, batches: int, tokens: int = 3, size: int = 2) -> pd.DataFrame:
        evaluation = Evaluation(loaded, methods, tokens, UnitStore(folder, {}))
        for first in range(0, batches * size, size):
            evaluation.run_batch(samples[first : first + size])
        return evaluation.table().drop(columns="prefill_ms")

    store = tmp_path / "parts"
    table(store, 1, tokens=1)
    table(store, 2, size=3)
    table(store, 1)
    whole = table(None, 3)
    pd.testing.assert_frame_equal(table(store, 3), whole, check_exact=True)
    timed = Evaluation(loaded, methods, 3, UnitStore(store, {}))
    seconds: list[float | None] = []
    timed.after_unit = lambda _samples, full: seconds.append(full)
    timed.run_batch(samples[:2])
    assert seconds == [None] * 5  # nothing ran


def test_beams_and_sampling_of_a_checkpoint_do_not_count(run: Path) -> None:
    """With beams, the logits of a batch have other rows than its answers."""
    options = json.loads((run / "run.json").read_text())["options"]
    loaded, data = load_backbone(options["backbone"], device="cpu"), open_data(options["dataset"])
    entries = [entry for entry in read_entries(run / "1_samples.jsonl") if entry.use == "held_out"]
    samples = [data.load(entry) for entry in entries[:3]]
    schedule = Schedule.load(run / "4_schedule.json")

    def table() -> pd.DataFrame:
        evaluation = Evaluation(loaded, [Method("schedule", schedule, 0.4)], 3)
        evaluation.run_batch(samples)
        return evaluation.table().drop(columns="prefill_ms")

    expected = table()
    asked: Any = loaded.backbone.model.generation_config
    asked.num_beams, asked.do_sample = 3, True
    pd.testing.assert_frame_equal(table(), expected, check_exact=True)
