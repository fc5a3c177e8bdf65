"""The hard subset in the table of `evaluate`, and in what the terminal shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest

from pruning_runtime import Schedule
from schedule_finder.cli.terminal import evaluation as terminal
from schedule_finder.evaluation.hard_subset import HARD_COLUMNS, describe_hard, hard_items, on_hard_items
from schedule_finder.evaluation.methods import SMALLER_IMAGES, Method
from schedule_finder.evaluation.outcomes import Outcome, summarize

SCHEDULE = Schedule.preset("fastv/llava-1.5-7b")
OURS = ("schedule", "sha256:1")


def method(name: str, *, draw: int | None = None, of: tuple[str, str] = OURS, budget: float = 0.5) -> Method:
    return Method(name, SCHEDULE, budget, draw=draw, of=of)


def outcomes(scores: Sequence[float | None]) -> list[Outcome]:
    """The last two are of another question type."""
    return [
        Outcome(
            id=str(number), question_type="count" if number >= len(scores) - 2 else "where", answer="", correct=None,
            agrees=True, kl=0.0, processed=1.0, published=1.0, flops=1.0, kv_bytes=1.0, prefill_ms=1.0, score=score,
        )
        for number, score in enumerate(scores)
    ]  # fmt: skip


def test_hard_items_are_those_that_only_the_full_model_answers() -> None:
    full = np.array([1, 1, 0, 0.5, 0.5, 0.4, math.nan, 1])
    small = np.array([0, 1, 0, 0.4, 0.5, 0.0, 0, math.nan])
    assert hard_items(full, small).tolist() == [True, False, False, True, False, False, False, False]


def test_on_hard_items_by_hand() -> None:
    found = on_hard_items(np.array([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]), np.ones(4))
    assert (found["hard_n"], found["hard_score"], found["hard_retention"]) == (4, 0.375, 0.375)
    assert 0 <= found["hard_low"] < 0.375 < found["hard_high"]
    partial = on_hard_items(np.array([[0.6, 0.3]]), np.array([0.6, 0.9]))
    assert partial["hard_retention"] == pytest.approx(0.9 / 1.5)
    assert partial["hard_low"] == pytest.approx(0.3)  # bootstrap of two items
    nothing = on_hard_items(np.empty((1, 0)), np.empty(0))
    assert nothing.pop("hard_n") == 0
    assert all(math.isnan(value) for value in nothing.values())


@pytest.mark.parametrize(("count", "few"), [(0, True), (9, True), (10, False)])
def test_too_few_hard_items_are_named(count: int, few: bool) -> None:
    assert describe_hard(count, 20).startswith(f"hard subset: {count} of 20 items")
    assert ("too few" in describe_hard(count, 20)) is few


def table() -> pd.DataFrame:
    """Two schedules; images were made smaller for the first only."""
    return summarize(
        {
            Method.full(SCHEDULE): outcomes([1, 1, 1, 0, 1, 1]),
            method("schedule"): outcomes([1, 1, 0, 1, 1, 0]),
            method("random", draw=0): outcomes([1, 0, 0, 0, 0, 0]),
            method("random", draw=1): outcomes([0, 1, 0, 1, 0, 0]),
            method(SMALLER_IMAGES): outcomes([1, 0, 0, 1, 0, 1]),
            method("other", of=("other", "sha256:2")): outcomes([0] * 6),
        }
    ).set_index(["method", "question_type"])


def test_the_table_has_each_method_on_the_hard_samples() -> None:
    found = table()
    # Samples 1, 2 and 4 are hard.
    assert found.hard_n["schedule", "all"] == 3
    assert found.hard_score["schedule", "all"] == pytest.approx(2 / 3)
    assert found.hard_score["random", "all"] == pytest.approx(1 / 6)  # mean over the draws
    assert found.hard_score[SMALLER_IMAGES, "all"] == 0
    assert (found.hard_n["schedule", "where"], found.hard_score["schedule", "where"]) == (2, 0.5)
    assert (found.hard_n["schedule", "count"], found.hard_score["schedule", "count"]) == (1, 1)
    for name in ("full", "other"):
        assert found.loc[name, list(HARD_COLUMNS)].isna().all(axis=None)


def test_samples_without_references_have_no_hard_subset() -> None:
    found = summarize(
        {
            Method.full(SCHEDULE): outcomes([None] * 3),
            method("schedule"): outcomes([None] * 3),
            method(SMALLER_IMAGES): outcomes([None] * 3),
        }
    )
    assert found[found.method == "schedule"].hard_n.eq(0).all()


def test_the_terminal_says_how_many_and_that_they_are_too_few(capsys: pytest.CaptureFixture[str]) -> None:
    shown = table().reset_index()
    terminal._show_hard_subset(
        shown[(shown.question_type == "all") & (shown.schedule == "schedule")], "schedule"
    )
    output = " ".join(capsys.readouterr().out.split())
    assert "schedule: hard subset: 3 of 6 items" in output
    assert "fewer than 10 are too few" in output
    assert "66.7 (20.8-93.9)" in output
    terminal._show_hard_subset(shown[shown.schedule == "other"], "other")
    assert capsys.readouterr().out == ""
