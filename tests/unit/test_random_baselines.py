"""Random layers as a baseline: different draws within the budget."""

from __future__ import annotations

from typing import Any, cast

import pytest

from pruning_runtime import Schedule
from pruning_runtime.schedule import BackboneIdentity, Budget, ScorerChoice, Stage
from schedule_finder.evaluation.methods import BASELINES, RANDOM_DRAWS, Comparison
from schedule_finder.solvers import BudgetTarget
from tests.support.solver_profiles import shape_of


@pytest.mark.parametrize("layers", [4, 6, 8, 12, 16])
@pytest.mark.parametrize("share", [0.3, 0.35, 0.5])
def test_draws_of_random_layers_differ_and_spend_the_budget(layers: int, share: float) -> None:
    """On a shallow decoder a single stage has few layers to be at, so that draws would often coincide."""
    schedule = Schedule(
        backbone=BackboneIdentity(name="tiny", model_type="llava", num_layers=layers),
        stages=(Stage(layer=1, keep_ratio=0.5),),
        scorer=ScorerChoice(name="text_guided"),
        budget=Budget(kind="processed", target=share, processed=share, published=share, flops=share),
    )
    target = BudgetTarget("processed", share, shape_of(layers), 100, 20)
    unused = cast(Any, None)
    comparison = Comparison(schedule, unused, (), unused, lambda: target, lambda: 0)
    methods = list(BASELINES["random-layers"]("random-layers", comparison))
    stages = [method.schedule.stages for method in methods]
    assert len(set(stages)) == len(stages) == RANDOM_DRAWS
    assert [method.draw for method in methods] == list(range(RANDOM_DRAWS))
    assert {method.name for method in methods} == {"random layers"}
    for found in stages:
        assert target.cost(found) == pytest.approx(target.target, rel=1e-6)
