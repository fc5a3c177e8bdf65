"""The allocation is the best there is: against brute force, and against losses whose optimum is known."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_runtime.costs import pre_decoder_share, prefill_flops, processed_ratios
from pruning_runtime.schedule import Stage
from schedule_finder.measuring.latency_model import LatencyModel
from schedule_finder.measuring.token_policy import TokenPolicy
from schedule_finder.solvers import BudgetTarget
from schedule_finder.solvers.allocation import allocate
from tests.support.solver_profiles import shape_of

RATIOS = np.array([1.0, 0.75, 0.5, 0.25, 0.0])
LATENCY = LatencyModel((10.0, 50.0, 120.0), (0.2, 0.5, 1.7), 0.0, 1, "cpu")
KINDS = ("processed", "published", "flops", "kv", "latency")


def target_of(kind: str, budget: float, layers: int) -> BudgetTarget:
    return BudgetTarget(kind, budget, shape_of(layers), 100, 20, LATENCY)


def stages_of(path: tuple[float, ...]) -> tuple[Stage, ...]:
    """A ratio per layer as stages."""
    return tuple(
        Stage(layer=layer - 1, keep_ratio=after)
        for layer, (before, after) in enumerate(itertools.pairwise((1.0, *path)))
        if after != before
    )


def losses(rng: np.random.Generator, layers: int, first: bool) -> np.ndarray:
    """Fewer tokens lose more; whether tokens may leave before the ``first`` layer is in its row."""
    loss = np.cumsum(rng.exponential(1.0, (layers, len(RATIOS))), axis=1)
    loss[:, 0] = 0
    if not first:
        loss[0, 1:] = np.inf
    return loss


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
    budget=st.floats(0.3, 0.95),
    before=st.booleans(),
)
def test_no_path_on_the_grid_loses_less(
    seed: int, layers: int, kind: str, budget: float, before: bool
) -> None:
    loss = losses(np.random.default_rng(seed), layers, before)
    target = target_of(kind, budget, layers)
    paths = [
        path
        for path in itertools.product(RATIOS, repeat=layers)
        if list(path) == sorted(path, reverse=True) and (before or path[0] == 1)
    ]
    found = allocate(loss, RATIOS, target, layers)
    fits = {len(stages_of(path)) for path in paths if target.cost(stages_of(path)) <= target.target * 0.98}
    assert fits - {0} <= set(found)
    for number, (value, stages) in found.items():
        assert target.cost(stages) <= target.target * 1.01
        assert len(stages) == number
        assert before or stages[0].layer >= 0
        # Rounding the budget to steps may cost a path that only just fits.
        fitting = [
            stages_of(path)
            for path in paths
            if len(stages_of(path)) == number and target.cost(stages_of(path)) <= target.target * 0.98
        ]
        if fitting:
            assert value <= min(loss_of(loss, one) for one in fitting) + 1e-9
        # The last ratio takes up what rounding left over, or overspent by a step.
        assert loss_of(loss, stages) <= value + 0.02 * loss[np.isfinite(loss)].max()


@pytest.mark.parametrize("kind", KINDS)
def test_layer_costs_add_up_to_the_cost(kind: str) -> None:
    target = target_of(kind, 0.5, 7)
    rng = np.random.default_rng(0)
    for before in (False, True) * 20:
        path = tuple(sorted(rng.choice(RATIOS, 7), reverse=True))
        path = path if before else (1.0, *path[1:])
        costs = target.layer_costs(np.array(path))
        assert costs.shape == (7, 7)
        assert costs.diagonal().sum() == pytest.approx(target.cost(stages_of(path)))


@pytest.mark.parametrize("kind", KINDS)
def test_layer_costs_add_up_where_layers_differ(kind: str) -> None:
    """Every other layer is six times as expensive, in its linear maps and in its pairs; layer 2 has no pairs."""
    layers = 7
    unlike = dataclasses.replace(
        shape_of(layers),
        linear_flops=(10_000, 60_000) * 3 + (10_000,),
        pair_flops=(50, 300, 0, 300, 50, 300, 50),
        scoring_flops=3_000,
    )
    target = dataclasses.replace(target_of(kind, 0.5, layers), shape=unlike)
    rng = np.random.default_rng(0)
    for _ in range(40):
        path = tuple(sorted(rng.choice(RATIOS, layers), reverse=True))
        costs = target.layer_costs(np.array(path))
        assert costs.diagonal().sum() == pytest.approx(target.cost(stages_of(path)))


def test_tokens_go_where_a_layer_needs_none() -> None:
    """Only layers 0 to 3 lose anything: the cut stands behind them, and the rest of the budget is theirs."""
    loss = np.zeros((8, len(RATIOS)))
    loss[:4] = 1 - RATIOS
    found = allocate(loss, RATIOS, target_of("processed", 0.5, 8), 2)
    value, stages = found[1]
    assert value == pytest.approx(0)
    assert stages == (Stage(layer=3, keep_ratio=0.0),)


def test_a_budget_below_a_first_layer_that_sees_everything_has_no_stages() -> None:
    loss = losses(np.random.default_rng(0), 8, False)
    assert allocate(loss, RATIOS, target_of("processed", 0.1, 8), 3) == {}
    assert allocate(loss, RATIOS, target_of("processed", 0.2, 8), 3)


def test_before_the_decoder_tokens_leave_where_the_first_layer_needs_few() -> None:
    """A first layer that needs a quarter and others that need half: the budget is just that and the scoring."""
    loss = np.maximum(0.5 - RATIOS, 0) * np.ones((8, 1))
    loss[0] = np.maximum(0.25 - RATIOS, 0)
    scoring = pre_decoder_share(shape_of(8)) / 8
    value, (stage,) = allocate(loss, RATIOS, target_of("processed", 0.5 + scoring, 8), 2)[1]
    assert (value, stage.layer) == (0, -1)
    assert stage.keep_ratio == pytest.approx(0.5, abs=1e-8)
    # Without a budget for scoring, a layer gets fewer tokens than it needs.
    assert allocate(loss, RATIOS, target_of("processed", 0.5, 8), 2)[1][0] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_before_the_decoder_is_charged(kind: str) -> None:
    """By hand: the projections of queries, keys and values of 120 tokens, one layer's, once more."""
    shape, target = shape_of(7), target_of(kind, 0.5, 7)
    maps = 64 * (4 * 16 + 2 * 2 * 16), 64 * (2 * 4 * 16 + 2 * 2 * 16) + 3 * 64 * 128
    share = maps[0] / maps[1]
    full = prefill_flops(shape, [120] * 7)
    stages = (Stage(layer=-1, keep_ratio=0.5), Stage(layer=2, keep_ratio=0.25))
    three, four = 70, 45  # tokens of the layers
    free = {
        "processed": (3 * 0.5 + 4 * 0.25) / 7,
        "published": (2 * 0.5 + 5 * 0.25) / 7,
        "flops": prefill_flops(shape, [three] * 3 + [four] * 4) / full,
        "kv": (3 * three + 4 * four) / (7 * 120),
        "latency": LATENCY.prefill_ms([three] * 3 + [four] * 4, 2) / (7 * 1.7),
    }
    pre_decoder_cost = {
        "processed": share / 7,
        "flops": 2 * 120 * maps[0] / full,
        "latency": share * 1.7 / (7 * 1.7),
    }
    assert target.cost(stages) == pytest.approx(free[kind] + pre_decoder_cost.get(kind, 0.0), abs=1e-12)
    # A scorer that needs no attention adds no cost.
    assert getattr(target.under(TokenPolicy("strided")).account(stages), kind) == pytest.approx(
        free[kind], abs=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    budget=st.floats(0.05, 0.99),
    layers=st.lists(st.integers(-1, 9), min_size=1, max_size=3, unique=True).map(sorted),
    seed=st.integers(0, 999),
)
def test_what_is_spent_is_the_budget_with_scoring_before_the_decoder(
    kind: str, budget: float, layers: list[int], seed: int
) -> None:
    target = target_of(kind, budget, 12)
    ratios = sorted(np.random.default_rng(seed).uniform(0, 1, len(layers) - 1).tolist(), reverse=True)
    stages = target.spend_rest(layers, ratios)
    if stages is not None:
        assert target.cost(stages) == pytest.approx(budget, abs=2e-9)
    # It is refused only where nothing meets it.
    ceiling = ratios[-1] if ratios else 1.0
    least, most = (
        target.cost(
            [Stage(layer=layer, keep_ratio=r) for layer, r in zip(layers, (*ratios, last), strict=True)]
        )
        for last in (0.0, ceiling)
    )
    assert (stages is not None) == (least <= budget + 1e-9 and most >= budget - 1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), scoring=st.sets(st.integers(0, 6), min_size=2))
def test_tokens_leave_after_layers_that_score(seed: int, scoring: set[int]) -> None:
    layers = 8
    target = dataclasses.replace(target_of("processed", 0.95, layers), scoring_layers=sorted(scoring))
    loss = losses(np.random.default_rng(seed), layers, first=True)
    for _, stages in allocate(loss, RATIOS, target, 3).values():
        assert {max(stage.layer, 0) for stage in stages} <= scoring


@pytest.mark.parametrize("stage_ms", [0.05, 0.2085, 0.5])
@pytest.mark.parametrize("most_stages", [1, 4])
def test_a_stage_that_takes_time_is_paid_for(stage_ms: float, most_stages: int) -> None:
    """Layers may not spend what the stages take, or no ratio is left that fits."""
    layers = 12
    loss = losses(np.random.default_rng(0), layers, first=True)
    latency = dataclasses.replace(LATENCY, stage_ms=stage_ms)
    for budget in np.linspace(0.3, 1.0, 36):
        target = dataclasses.replace(target_of("latency", float(budget), layers), latency=latency)
        found = allocate(loss, RATIOS, target, most_stages)
        reachable = target.cost((Stage(layer=0, keep_ratio=0.0),)) <= budget - 0.02
        assert found or not reachable, f"nothing at {budget:.2f}"
        for number, (_, stages) in found.items():
            assert len(stages) == number
            assert target.cost(stages) <= budget * (1 + 1 / 400) + 1e-9
