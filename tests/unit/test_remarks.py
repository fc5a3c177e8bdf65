"""What an evaluation says beside its table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pruning_runtime import Schedule
from pruning_runtime.schedule import BackboneIdentity, ScorerChoice, Stage
from schedule_finder.evaluation.methods import Method
from schedule_finder.evaluation.outcomes import Outcome, summarize
from schedule_finder.evaluation.remarks import left_out, remarks
from schedule_finder.intervals import mean_interval, paired_interval, wilson_interval

SCHEDULE = Schedule(
    backbone=BackboneIdentity(model_type="planted", name="planted", num_layers=6),
    stages=(Stage(layer=1, keep_ratio=0.5),),
    scorer=ScorerChoice(name="last_token"),
)
OF = ("mine", "digest")


def outcome(number: int, score: float | None, prefill_ms: float = 5.0) -> Outcome:
    return Outcome(
        id=str(number),
        question_type="all",
        answer="red",
        correct=None if score is None else score == 1,
        agrees=True,
        kl=0.1,
        processed=0.5,
        published=0.5,
        flops=0.5,
        kv_bytes=1.0,
        prefill_ms=prefill_ms,
        reference=None if score is None else "red",
        references=() if score is None else ("red",),
        score=score,
    )


def methods(*names: str, schedule: Schedule = SCHEDULE) -> list[Method]:
    return [replace(Method(name, schedule, 0.5), of=OF) for name in names]


def table_of(own: list[Outcome], full: list[Outcome], **others: list[Outcome]) -> Any:
    found = {Method.full(SCHEDULE): full, methods("schedule")[0]: own}
    return summarize(found | dict(zip(methods(*others), others.values(), strict=True)))


def test_scores_are_counted_apart_from_samples() -> None:
    some = [outcome(number, 1.0 if number < 4 else None) for number in range(10)]
    table = table_of(some, some)
    assert table.n.tolist() == [10, 10]
    assert table.scored.tolist() == [4, 4]
    assert list(remarks(table)) == [
        "6 of 10 samples have no reference answer: scores and their intervals are over the other 4"
    ]


@pytest.mark.parametrize("score", [1.0, None])
def test_nothing_is_said_where_all_or_none_have_a_reference(score: float | None) -> None:
    some = [outcome(number, score) for number in range(10)]
    assert list(remarks(table_of(some, some))) == []


def test_a_slower_schedule_is_named() -> None:
    full = [outcome(number, 1.0) for number in range(10)]
    slow = [outcome(number, 1.0, prefill_ms=6.0) for number in range(10)]
    (line,) = remarks(table_of(slow, full))
    assert "took 120% of the full model's time, as ranking tokens by last_token" in line
    nearly = [outcome(number, 1.0, prefill_ms=5.1) for number in range(10)]
    assert list(remarks(table_of(nearly, full))) == []
    # A baseline may be slow.
    assert list(remarks(table_of(full, full, strided=slow))) == []


def test_equal_scores_of_few_samples_are_no_proof_of_equality() -> None:
    same = [outcome(number, 1.0) for number in range(20)]
    own = [outcome(number, 1.0) for number in range(20)]
    rows = table_of(own, same, strided=same).set_index("method")
    rarest = wilson_interval(0, 20)[1]
    found = rows.loc["strided", ["difference", "difference_low", "difference_high"]].tolist()
    assert found == pytest.approx([0.0, -rarest, rarest])
    assert rows.loc["schedule", ["difference", "difference_low", "difference_high"]].tolist() == [0, 0, 0]


def test_an_interval_of_unequal_scores_is_the_bootstraps() -> None:
    differences = np.array([0.0, 1.0, -1.0, 0.0, 1.0])
    assert paired_interval(differences) == mean_interval(differences)


def test_baselines_without_a_method_are_told() -> None:
    asked = ("random", "evs", "random-layers", "last_token", "not-merged", "paper")
    assert left_out(asked, methods("schedule", "random", "random layers")) == ["evs", "paper"]
    merging = SCHEDULE.model_copy(update={"dropped_tokens": "merge"})
    assert left_out(("not-merged",), methods("schedule", schedule=merging)) == ["not-merged"]
    assert left_out(("not-merged",), methods("schedule", "not merged", schedule=merging)) == []
