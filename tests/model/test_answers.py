"""Every answer is kept, low quality is visible, and random baselines are several draws; through the command line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from pruning_runtime import Schedule
from schedule_finder.evaluation.metrics import same_answer
from tests.support.command_line import call, output_of
from tests.support.tiny_folder import write_jsonl, write_llava_folder

ROOT = Path(__file__).parents[2]
KILLED_AFTER_TWO_UNITS = """
import os, signal
import tests.conftest  # torchvision beside a CPU build of torch
from schedule_finder.cli.commands import app
from schedule_finder.measuring.unit_store import UnitStore

put, left = UnitStore.put, [1, 2]

def put_or_end(store, *unit):
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    put(store, *unit)
    left.pop()

UnitStore.put = put_or_end
app()
"""
HELD_OUT, TOKENS, BATCH = 6, 2, 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of random weights, its data, and a run that ends with step 4; not to be changed."""
    folder = tmp_path_factory.mktemp("answers")
    checkpoint, data = write_llava_folder(folder / "llava"), write_jsonl(folder / "data", 30)
    out = folder / "run"
    call(
        "profile", checkpoint, "--dataset", data, "--samples", 16, "--eval-samples", HELD_OUT, "--out", out,
    )  # fmt: skip
    call("detect", out)
    call("schedule", out, "--solver", "retained", "--budget", "40%")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return shutil.copytree(made / "run", tmp_path / "run")


def evaluate(run: Path, *options: object) -> pd.DataFrame:
    call("evaluate", run, "--max-new-tokens", TOKENS, "--batch-size", BATCH, *options)
    return pd.read_parquet(run / "5_answers.parquet")


def test_every_answer_is_kept_beside_its_reference(run: Path) -> None:
    answers = evaluate(run, "--baselines", "strided")
    assert sorted(answers.method) == sorted(["full", "schedule", "strided"] * HELD_OUT)
    lines = [json.loads(line) for line in (run / "1_samples.jsonl").read_text().splitlines()]
    ids = {line["id"] for line in lines if line["use"] == "held_out"}
    assert set(answers.id) == ids
    assert answers.reference.notna().all()
    judged = [same_answer(row.answer, row.reference) for row in answers.itertuples()]
    assert answers.correct.tolist() == judged
    table = pd.read_csv(run / "5_evaluation.csv").query("question_type == 'all'").set_index("method")
    for method, rows in answers.groupby("method"):
        assert rows.correct.mean() == pytest.approx(table.exact_match[method])
        assert rows.kl.mean() == pytest.approx(table.kl[method], rel=1e-4)
        assert set(rows.budget) == {table.budget[method]}


def test_answers_survive_a_kill_bit_by_bit(run: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(run, tmp_path / "whole")
    evaluate(whole)
    options = ["--max-new-tokens", str(TOKENS), "--batch-size", str(BATCH)]
    command = [sys.executable, "-c", KILLED_AFTER_TWO_UNITS, "evaluate", str(run), *options]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert _units(run) == 2
    assert not (run / "5_answers.parquet").exists()
    evaluate(run)
    assert (run / "5_answers.parquet").read_bytes() == (whole / "5_answers.parquet").read_bytes()


def _units(run: Path) -> int:
    return sum(path.read_bytes().count(b"\n") - 1 for path in (run / "5_evaluation.parts").glob("*.jsonl"))


def test_a_model_that_answers_nothing_correctly_is_reported_with_three_examples(run: Path) -> None:
    output = output_of("evaluate", run, "--max-new-tokens", TOKENS, "--baselines", "none")
    answers = pd.read_parquet(run / "5_answers.parquet").query("method == 'full'")
    assert answers.correct.mean() < 0.1  # random weights
    recorded = json.loads((run / "5_evaluation.json").read_text())["full_model"]
    assert recorded["exact_match"] == answers.correct.mean()
    assert len(recorded["examples"]) == 3
    for text in (output, output_of("inspect", run), output_of("inspect", run / "4_schedule.json")):
        assert f"warning: the full model answers 0 of {HELD_OUT} samples correctly, less than 10 %" in text
        for example in recorded["examples"]:
            row = answers.set_index("id").loc[example["id"]]
            assert (example["answer"], example["reference"]) == (row.answer, row.reference)
            assert f"{example['id']}: answer {row.answer!r}, reference {row.reference!r}" in text


def test_run_asks_the_full_model_first_and_the_schedule_records_it(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    asked = (
        "run", made / "llava", "--dataset", made / "data" / "data.jsonl", "--samples", 10, "--solver", "retained",
        "--max-new-tokens", TOKENS, "--baselines", "none", "--out", out,
    )  # fmt: skip
    lines = output_of(*asked, "--eval-samples", 20).splitlines()
    first = next(
        index for index, line in enumerate(lines) if line.startswith("warning: the full model answers")
    )
    profiled = next(index for index, line in enumerate(lines) if line.startswith("Change points"))
    assert first < profiled
    assert "0 of 16 samples" in lines[first]
    assert sum("reference" in line for line in lines[first + 1 : first + 4]) == 3
    held_out = {
        line["id"]
        for line in map(json.loads, (out / "1_samples.jsonl").read_text().splitlines())
        if line["use"] == "held_out"
    }
    recorded = Schedule.load(out / "4_schedule.json").evidence["full_model"]
    assert recorded["samples"] == 16
    assert {example["id"] for example in recorded["examples"]} <= held_out

    # The same model with its own answers as references: nothing to report, and no sample is held out.
    answers = pd.read_parquet(out / "5_answers.parquet").query("method == 'full'").set_index("id").answer
    rows = [json.loads(line) for line in (made / "data" / "data.jsonl").read_text().splitlines()]
    known = {
        line["id"]: line["row"]
        for line in map(json.loads, (out / "1_samples.jsonl").read_text().splitlines())
    }
    own = [rows[known[name]] | {"answer": answer} for name, answer in answers.items() if answer.strip()]
    assert len(own) > 4
    data = made / "data" / "own.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in own))
    quiet = (
        "run", made / "llava", "--dataset", data, "--samples", 4, "--eval-samples", 0, "--solver", "retained",
        "--max-new-tokens", TOKENS, "--out", tmp_path / "own",
    )  # fmt: skip
    assert "warning" not in output_of(*quiet)
    recorded = Schedule.load(tmp_path / "own" / "4_schedule.json").evidence["full_model"]
    assert (recorded["samples"], recorded["exact_match"], recorded["warning"]) == (4, 1.0, None)


def test_random_baselines_are_different_draws_with_mean_and_range(run: Path) -> None:
    output = output_of(
        "evaluate",
        run,
        "--max-new-tokens",
        TOKENS,
        "--batch-size",
        BATCH,
        "--baselines",
        "random,random-layers",
    )
    table = pd.read_csv(run / "5_evaluation.csv").query("question_type == 'all'").set_index("method")
    answers = pd.read_parquet(run / "5_answers.parquet")
    for method in ("random", "random layers"):
        assert f"{method} x3" in output
        draws = [rows.set_index("id") for _, rows in answers[answers.method == method].groupby("draw")]
        assert len(draws) == table.draws[method] == 3
        assert len({tuple(rows.kl) for rows in draws}) == 3
        means = [rows.correct.mean() for rows in draws]
        row = table.loc[method]
        assert (row.draw_low, row.exact_match, row.draw_high) == pytest.approx(
            (min(means), sum(means) / 3, max(means))
        )
    assert table.draws.drop(["random", "random layers"]).isna().all()
    call("plot", run)
    drawn = pd.read_csv(run / "6_figures" / "5_accuracy.csv").set_index("method")
    assert drawn.draw_high["random"] == pytest.approx(table.draw_high["random"], rel=1e-4)


def test_the_choice_of_a_scorer_is_explained(run: Path) -> None:
    assert "scorer auto: text_guided, the default; no other scorer was measured" in output_of("inspect", run)
    output = output_of("schedule", run, "--solver", "sensitivity", "--budget", "40%")
    schedule = Schedule.load(run / "4_schedule.json")
    choice = schedule.evidence["solver"]["policy_choice"]
    assert choice["chosen"].split(",")[0] == schedule.scorer.name
    assert f"chosen on {choice['samples']} samples: {choice['chosen']}: " in output
    measured = {name: one["measured_change"] for name, one in schedule.evidence["solver"]["policies"].items()}
    assert measured[choice["best"]] == min(measured.values())
    excess = measured[choice["preferred"]] - measured[choice["compared"]]
    assert choice["difference"] == pytest.approx(excess, abs=2e-5)
    low, high = choice["interval"]
    expected = {
        "preferred is best": choice["chosen"] == choice["preferred"] == choice["best"],
        "preferred within tolerance": choice["chosen"] == choice["preferred"]
        and choice["difference"] <= choice["tolerance"] + 1e-5
        and low <= 0,
        "significantly better": choice["chosen"] != choice["preferred"] and low >= 0 and high > 0,
        "beyond tolerance": choice["chosen"] == choice["best"]
        and choice["difference"] > choice["tolerance"] - 1e-5,
    }
    assert expected[choice["rule"]]
    output = output_of(
        "schedule", run, "--solver", "sensitivity", "--budget", "40%", "--scorer", "last_token"
    )
    assert "scorer auto" not in output
