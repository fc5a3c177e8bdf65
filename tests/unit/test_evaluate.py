"""Pieces of the evaluation that need no model."""

from __future__ import annotations

from typing import Any

import pytest

from pruning_runtime.schedule import BackboneIdentity, Budget, Schedule, ScorerChoice, Stage
from schedule_finder.evaluation import methods
from schedule_finder.evaluation.methods import Comparison, methods_to_compare
from schedule_finder.evaluation.metrics import same_answer
from schedule_finder.solvers import BudgetTarget
from tests.support.solver_profiles import shape_of


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("Red", "red", True),
        (" the red star. ", "red star", True),
        ("red", "blue", False),
        ("", "red", False),
        ("10", "1", False),
        ("an apple", "apple", True),
    ],
)
def test_same_answer(found: str, expected: str, same: bool) -> None:
    assert same_answer(found, expected) is same


def merging(*_: object) -> Schedule:
    return Schedule(
        backbone=BackboneIdentity(name="planted", model_type="llava", num_layers=12),
        stages=(Stage(layer=2, keep_ratio=0.5),),
        scorer=ScorerChoice(name="text_guided"),
        dropped_tokens="merge",
        budget=Budget(kind="processed", target=0.35, processed=0.35, published=0.3),
    )


def compared(baselines: tuple[str, ...], sweep: tuple[float, ...] = ()) -> list[tuple[str, str, float]]:
    """Name, dropped tokens and budget of the methods that are evaluated."""
    nothing: Any = None
    comparison = Comparison(merging(), nothing, (), merging, nothing, nothing)
    found = methods_to_compare(comparison, baselines, sweep)
    return [(method.name, method.schedule.dropped_tokens, method.budget) for method in found]


def test_baselines_are_merged_and_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_can_run", lambda *_: True)
    assert compared(("strided", "visionzip", "paper", "not-merged")) == [
        ("schedule", "merge", 0.35),
        ("strided", "merge", 0.35),
        ("visionzip", "discard", 0.35),  # merges by its own rule
        ("paper", "merge", 0.35),
        ("not merged", "discard", 0.35),
        ("strided, not merged", "discard", 0.35),
        ("paper, not merged", "discard", 0.35),
    ]
    assert [name for name, *_ in compared(("strided",))] == ["schedule", "strided"]


def test_a_sweep_has_the_same_baselines_at_each_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_can_run", lambda *_: True)
    names = [name for name, *_ in compared(("strided", "divprune"), (0.5, 0.35))]
    assert names == ["schedule", "strided", "divprune", "schedule", "strided", "divprune", "not merged"]
    both = [name for name, *_ in compared(("strided", "not-merged"), (0.5,))]
    assert both == 2 * ["schedule", "strided", "not merged", "strided, not merged"]


@pytest.mark.parametrize(("scorer", "earliest"), [("dart", 0), ("v2drop", 0), ("divprune", -1)])
def test_random_layers_are_where_the_scorer_can_score(scorer: str, earliest: int) -> None:
    """Over 40 budgets, some draw of a rule that scores before the decoder has a stage there."""
    nothing: Any = None
    found = []
    for budget in range(30, 70):
        target = BudgetTarget("processed", budget / 100, shape_of(12), 576, 64)
        schedule = merging().with_scorer(ScorerChoice(name=scorer))
        comparison = Comparison(schedule, nothing, (), merging, lambda target=target: target, lambda: -1)
        for method in methods_to_compare(comparison, ("random-layers",))[1:]:
            method.schedule.model_validate_json(method.schedule.model_dump_json())
            found.append(method.schedule.stages[0].layer)
    assert min(found) == earliest
