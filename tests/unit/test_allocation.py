"""The allocation is the best there is: against brute force, and against losses whose optimum is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_runtime.accounting import processed_ratios
from pruning_runtime.schedule import Stage
from schedule_finder.latency import LatencyModel
from schedule_finder.solvers import BudgetTarget
from schedule_finder.solvers.allocation import allocate
from tests.unit.test_solvers import shape_of

RATIOS = np.array([1.0, 0.75, 0.5, 0.25, 0.0])
LATENCY = LatencyModel((10.0, 50.0, 120.0), (0.2, 0.5, 1.7), 0.0, 1, "cpu")
KINDS = ("processed", "published", "flops", "kv", "latency")


def target_of(kind: str, budget: float, layers: int) -> BudgetTarget:
    return BudgetTarget(kind, budget, shape_of(layers), 100, 20, LATENCY)


def stages_of(path: tuple[float, ...]) -> tuple[Stage, ...]:
    """A ratio per layer as stages."""
    return tuple(
        Stage(layer=layer - 1, keep_ratio=path[layer])
        for layer in range(1, len(path))
        if path[layer] != path[layer - 1]
    )


def loss_of(loss: np.ndarray, stages: tuple[Stage, ...]) -> float:
    """What the layers lose, between measured ratios on a straight line."""
    ratios = processed_ratios(stages, len(loss))
    return sum(
        float(np.interp(ratio, RATIOS[::-1], row[::-1])) for ratio, row in zip(ratios, loss, strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 9999),
    layers=st.integers(3, 6),
    kind=st.sampled_from(KINDS),
    budget=st.floats(0.45, 0.95),
)
def test_no_path_on_the_grid_loses_less(seed: int, layers: int, kind: str, budget: float) -> None:
    rng = np.random.default_rng(seed)
    # Fewer tokens lose more.
    loss = np.cumsum(rng.exponential(1.0, (layers, len(RATIOS))), axis=1)
    loss[:, 0] = 0
    target = target_of(kind, budget, layers)
    paths = [
        (1.0, *rest)
        for rest in itertools.product(RATIOS, repeat=layers - 1)
        if list(rest) == sorted(rest, reverse=True)
    ]
    found = allocate(loss, RATIOS, target, layers - 1)
    fits = {len(stages_of(path)) for path in paths if target.cost(stages_of(path)) <= target.target * 0.98}
    assert fits - {0} <= set(found)
    for number, (value, stages) in found.items():
        assert target.cost(stages) <= target.target * 1.01
        assert len(stages) == number
        # Rounding the budget to steps may cost a path that only just fits.
        fitting = [
            stages_of(path)
            for path in paths
            if len(stages_of(path)) == number and target.cost(stages_of(path)) <= target.target * 0.98
        ]
        if fitting:
            assert value <= min(loss_of(loss, one) for one in fitting) + 1e-9
        # The last ratio takes up what rounding left over, or overspent by a step.
        assert loss_of(loss, stages) <= value + 0.02 * loss.max()


@pytest.mark.parametrize("kind", KINDS)
def test_layer_costs_add_up_to_the_cost(kind: str) -> None:
    target = target_of(kind, 0.5, 7)
    rng = np.random.default_rng(0)
    for _ in range(20):
        path = (1.0, *sorted(rng.choice(RATIOS, 6), reverse=True))
        costs = target.layer_costs(np.array(path))
        assert costs.shape == (7, 7)
        assert costs.diagonal().sum() == pytest.approx(target.cost(stages_of(path)))


def test_tokens_go_where_a_layer_needs_none() -> None:
    """Only layers 0 to 3 lose anything: the cut stands behind them, and the rest of the budget is theirs."""
    loss = np.zeros((8, len(RATIOS)))
    loss[:4] = 1 - RATIOS
    found = allocate(loss, RATIOS, target_of("processed", 0.5, 8), 2)
    value, stages = found[1]
    assert value == pytest.approx(0)
    assert stages == (Stage(layer=3, keep_ratio=0.0),)


def test_a_budget_below_the_first_layer_has_no_stages() -> None:
    assert allocate(np.ones((8, len(RATIOS))), RATIOS, target_of("processed", 0.1, 8), 3) == {}
