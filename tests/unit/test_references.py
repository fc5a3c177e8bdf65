"""Lists of reference answers: how tables give them, and how a list of samples keeps them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pruning_runtime import Schedule
from schedule_finder.evaluation.methods import Method
from schedule_finder.evaluation.metrics import METRICS
from schedule_finder.evaluation.outcomes import COLUMNS, Outcome, summarize
from schedule_finder.samples import Sample, SampleEntry, TableData, describe, read_entries, write_entries
from schedule_finder.samples.entries import update_entries
from schedule_finder.samples.presets import presets


def load(folder: Path, answer: Any, given: str = "") -> Sample:
    """The only sample of a table with this answer."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    row = {"image": "a.png", "question": "what is this ?", "answers": answer}
    (folder / "data.jsonl").write_text(json.dumps(row) + "\n")
    data = TableData(f"{given}{folder / 'data.jsonl'}")
    return data.load(SampleEntry(id="x", source=data.source, row=0, use="held_out"))


@pytest.mark.parametrize(
    ("answer", "first", "references"),
    [
        ("red", "red", ()),
        (["red"], "red", ()),
        (["red", "blue", "red", ""], "red", ("red", "blue", "red")),
        ('["red", "blue"]', "red", ("red", "blue")),
        ("[red]", "[red]", ()),
        ([{"answer": "red", "answer_confidence": "yes"}, {"answer": "blue"}], "red", ("red", "blue")),
        ([], None, ()),
        (None, None, ()),
    ],
)
def test_answers_of_a_table(
    tmp_path: Path, answer: Any, first: str | None, references: tuple[str, ...]
) -> None:
    sample = load(tmp_path, answer)
    assert (sample.answer, sample.references) == (first, references)
    assert sample.all_references == (references or (() if first is None else (first,)))
    assert sample.metric is None


def test_a_preset_brings_its_metric_and_its_ten_references(tmp_path: Path) -> None:
    given = ["blue"] * 3 + ["red"] * 7
    sample = load(tmp_path, given, "textvqa=")
    assert (sample.answer, sample.references, sample.metric) == ("red", tuple(given), "vqa_accuracy")


def test_every_preset_has_a_metric() -> None:
    assert {preset.metric for preset in presets().values()} <= set(METRICS)


def test_references_are_kept_in_the_list_of_samples(tmp_path: Path) -> None:
    entry = SampleEntry(id="x", source="data", row=0, use="held_out")
    sample = Sample("x", (), "what ?", "red", references=("red", "blue"))
    path = tmp_path / "1_samples.jsonl"
    write_entries(path, [entry])
    assert "references" not in path.read_text()  # the list of an earlier release is the same
    update_entries(path, [described := replace(describe(entry, sample), status="done")])
    assert read_entries(path) == [described]
    assert described.references == ("red", "blue")


def outcome(number: int, answer: str, references: tuple[str, ...], metric: str, **others: Any) -> Outcome:
    score = METRICS[metric].score(answer, references) if references else None
    return Outcome(
        id=str(number), question_type=others.get("question_type", "all"), answer=answer,
        correct=answer in references if references else None, agrees=True, kl=0.0, processed=1.0, published=1.0,
        flops=1.0, kv_bytes=1.0, prefill_ms=1.0, references=references, metric=metric, score=score,
    )  # fmt: skip


def table_of(*outcomes: Outcome) -> Any:
    full = Method.full(Schedule.preset("fastv/llava-1.5-7b"))
    return summarize({full: list(outcomes)}).set_index("question_type")


def test_the_table_has_the_metric_with_its_interval() -> None:
    ten = tuple(["red"] * 2 + ["dark red"] * 8)
    rows = [outcome(n, "red" if n % 2 else "dark red", ten, "vqa_accuracy") for n in range(40)]
    row = table_of(*rows).loc["all"]
    assert row.metric == "vqa_accuracy"
    assert row.score == pytest.approx((0.6 + 1) / 2)
    assert 0.7 < row.score_low < row.score < row.score_high < 0.9
    assert row.exact_match == 1  # any of the references
    assert row[["precision", "recall", "f1", "yes_share"]].isna().all()


def test_the_table_has_precision_recall_and_f1_of_yes() -> None:
    answers, references = ["yes", "yes", "no", "no"], ["yes", "no", "yes", "no"]
    rows = [outcome(n, a, (r,), "yes_no") for n, (a, r) in enumerate(zip(answers, references, strict=True))]
    row = table_of(*rows, outcome(9, "yes", (), "yes_no")).loc["all"]
    assert row[["score", "precision", "recall", "f1", "yes_share"]].tolist() == [0.5] * 5
    assert (row.score_low, row.score_high) == (row.ci_low, row.ci_high)  # of a share


def test_metrics_of_a_mixture_are_kept_apart() -> None:
    table = table_of(
        outcome(0, "yes", ("yes",), "yes_no", question_type="pope"),
        outcome(1, "hallo", ("hello",), "anls", question_type="docvqa"),
    )
    assert table.metric.to_dict() == {"all": "mixed", "docvqa": "anls", "pope": "yes_no"}
    assert table.score.to_dict() == pytest.approx({"all": 0.9, "docvqa": 0.8, "pope": 1.0})
    assert table.f1.notna().to_dict() == {"all": False, "docvqa": False, "pope": True}


def test_without_references_there_is_no_score() -> None:
    row = table_of(outcome(0, "red", (), "exact_match")).loc["all"]
    assert row[["score", "score_low", "score_high", "exact_match"]].isna().all()
    assert set(COLUMNS) - {"question_type"} == set(row.index)
