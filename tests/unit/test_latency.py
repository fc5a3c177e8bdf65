"""The latency model: between and beyond what was measured, and as a budget."""

from __future__ import annotations

import pytest

from pruning_runtime.schedule import Stage
from schedule_finder.errors import InputError
from schedule_finder.measuring.latency_model import LatencyModel
from schedule_finder.solvers import BudgetTarget
from tests.support.solver_profiles import shape_of

MODEL = LatencyModel((20.0, 70.0, 120.0), (1.0, 2.0, 4.0), stage_ms=0.5, batch_size=1, device="cpu")


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (20, 1.0),
        (45, 1.5),
        (70, 2.0),
        (95, 3.0),
        (240, 8.0),  # beyond: in proportion
        (5, 1.0),  # below: what the fewest took
    ],
)
def test_time_is_linear_between_measurements_and_in_proportion_beyond(tokens: int, expected: float) -> None:
    assert MODEL.prefill_ms([tokens], 0) == pytest.approx(expected)


def test_layers_and_stages_add_up() -> None:
    assert MODEL.prefill_ms([120, 45, 20], 2) == pytest.approx(4.0 + 1.5 + 1.0 + 2 * 0.5)
    assert MODEL.prefill_ms([], 0) == 0


def test_a_latency_budget_counts_layers_and_stages() -> None:
    target = BudgetTarget("latency", 0.5, shape_of(10), 100, 20, MODEL)
    assert target.full_ms == pytest.approx(40.0)
    stages = (Stage(layer=3, keep_ratio=0.5),)  # four layers of 120 tokens, six of 70, one stage
    assert target.cost(stages) == pytest.approx((4 * 4.0 + 6 * 2.0 + 0.5) / 40.0)
    spent = target.spend_rest([2], ())
    assert spent is not None
    assert target.cost(spent) == pytest.approx(0.5)


def test_pruning_that_does_not_pay_costs_more_than_the_full_model() -> None:
    target = BudgetTarget("latency", 0.5, shape_of(10), 100, 20, MODEL)
    assert target.cost((Stage(layer=8, keep_ratio=1.0),)) > 1


def test_a_latency_budget_needs_a_measurement() -> None:
    with pytest.raises(InputError, match="nothing was measured on this device yet"):
        BudgetTarget("latency", 0.5, shape_of(10), 100, 20)
