"""`--metric` and lists of references, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from schedule_finder.evaluation.metrics import METRICS
from tests.support.command_line import call, output_of
from tests.support.tiny_folder import write_jsonl, write_llava_folder

HELD_OUT = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on questions with three answers each, judged by VQA accuracy, with everything but figures."""
    folder = tmp_path_factory.mktemp("metrics")
    checkpoint, data = write_llava_folder(folder / "llava"), write_jsonl(folder / "data", 20)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text(
        "".join(json.dumps(row | {"answer": [row["answer"], "no", "two"]}) + "\n" for row in rows)
    )
    out = folder / "run"
    call(
        "run", checkpoint, "--dataset", data, "--samples", 10, "--eval-samples", HELD_OUT, "--out", out,
        "--solver", "retained", "--max-new-tokens", 2, "--baselines", "none", "--metric", "vqa_accuracy",
    )  # fmt: skip
    return out


def test_a_run_keeps_its_metric_and_all_references(run: Path) -> None:
    assert json.loads((run / "run.json").read_text())["options"]["metric"] == "vqa_accuracy"
    answers = pd.read_parquet(run / "5_answers.parquet")
    assert set(answers.metric) == {"vqa_accuracy"}
    assert all(len(found) == 3 for found in answers.references)
    expected = [METRICS["vqa_accuracy"].score(row.answer, row.references) for row in answers.itertuples()]
    assert answers.score.tolist() == expected
    table = pd.read_csv(run / "5_evaluation.csv")
    assert set(table.metric) == {"vqa_accuracy"}
    assert table.score[0] == pytest.approx(answers.score[answers.method == "full"].mean())
    first = json.loads((run / "1_first_answers.json").read_text())
    assert (first["metric"], first["exact_match"]) == ("vqa_accuracy", None)
    summary = json.loads((run / "5_evaluation.json").read_text())
    assert summary["methods"]["full"]["metric"] == "vqa_accuracy"
    drawn = pd.read_csv(run / "6_figures" / "5_accuracy.csv")
    assert set(drawn.measure) == {"score"}


def test_evaluate_judges_by_another_metric(run: Path) -> None:
    output = output_of("evaluate", run, "--max-new-tokens", 2, "--baselines", "none", "--metric", "yes_no")
    assert "yes or no" in output
    assert "F1" in output
    table = pd.read_csv(run / "5_evaluation.csv")
    assert table[["score", "precision", "recall", "f1", "yes_share"]].notna().all(axis=None)
    assert "held out: yes or no " in output_of("inspect", run / "4_schedule.json")


def test_an_unknown_metric_is_refused(run: Path) -> None:
    line = call("evaluate", run, "--metric", "bleu", code=2)
    assert line == f"error: --metric 'bleu': choose {', '.join(METRICS)}"
