"""Solvers that follow published work: at its own budget they give the published schedule back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_runtime import Schedule
from pruning_runtime.schedule import Stage
from schedule_finder.errors import InputError
from schedule_finder.solvers import SOLVERS, BudgetTarget, Problem
from schedule_finder.solvers.shapes import raised_to_budget, random_stages, scaled_to_budget
from tests.support.solver_profiles import KINDS, POLICY, profile_of, random_profile, shape_of

HALF_A_TOKEN = 0.5 / 576
PRESETS = {"paper": "adaptinfer/llava-1.5-7b-64", "pyramid": "pyramiddrop/llava-1.5-7b"}


def target_of(budget: float, kind: str = "processed", layers: int = 32) -> BudgetTarget:
    return BudgetTarget(kind, budget, shape_of(layers), 576, 60)


def cost_of(stages: tuple[Stage, ...], kind: str = "processed", layers: int = 32) -> float:
    return target_of(1.0, kind, layers).cost(stages)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", PRESETS)
def test_a_published_schedule_comes_back_at_its_own_budget(solver: str, kind: str) -> None:
    published = Schedule.preset(PRESETS[solver]).stages
    target = target_of(cost_of(published, kind), kind)
    found = SOLVERS[solver]().solve(Problem(random_profile(32, 0), (), target, POLICY)).stages
    assert [stage.layer for stage in found] == [stage.layer for stage in published]
    assert [stage.keep_ratio for stage in found] == pytest.approx(
        [stage.keep_ratio for stage in published], abs=HALF_A_TOKEN
    )


def test_the_paper_follows_its_turning_points_where_there_are_two() -> None:
    target = target_of(0.2)
    profile = random_profile(32, 0)
    followed = SOLVERS["paper"]().solve(Problem(profile, (8, 17, 25), target, POLICY))
    assert [stage.layer for stage in followed.stages] == [1, 7, 16]
    assert followed.evidence.placed_by == "change points"
    alone = SOLVERS["paper"]().solve(Problem(profile, (8,), target, POLICY))
    assert [stage.layer for stage in alone.stages] == [1, 10, 20]
    assert "published layers" in alone.evidence.placed_by


@pytest.mark.parametrize("needed", [{4: 10}, {2: 24, 6: 4}])
def test_fitprune_keeps_the_tokens_that_carry_the_attention(needed: dict[int, int]) -> None:
    """From each of these layers on attention is even over fewer of 40 tokens: as many stay."""
    rng = np.random.default_rng(0)
    maps = []
    for _ in range(5):
        order = rng.permutation(40)
        attention = np.full((10, 40), 0.01, dtype=np.float32)
        for layer, tokens in needed.items():
            attention[layer:] = 0
            attention[layer:, order[:tokens]] = 1 / tokens
        maps.append(attention)
    planted = tuple(Stage(layer=layer, keep_ratio=tokens / 40) for layer, tokens in needed.items())
    target = BudgetTarget("processed", cost_of(planted, layers=10), shape_of(10), 40, 8)
    found = SOLVERS["fitprune"]().solve(Problem(profile_of(maps), (), target, POLICY)).stages
    assert [stage.layer for stage in found] == [stage.layer for stage in planted]
    assert [stage.keep_ratio for stage in found] == pytest.approx(
        [stage.keep_ratio for stage in planted], abs=1e-6
    )


@settings(max_examples=100, deadline=None)
@given(
    layers=st.integers(4, 48),
    places=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    ratios=st.lists(st.floats(0.01, 0.99), min_size=4, max_size=4),
    kind=st.sampled_from(KINDS),
    budget=st.floats(0.02, 1.0),
)
def test_any_shape_meets_any_budget(
    layers: int, places: list[float], ratios: list[float], kind: str, budget: float
) -> None:
    target = target_of(budget, kind, layers)
    shape = sorted(places), sorted(ratios, reverse=True)[: len(places)]
    least = cost_of((Stage(layer=0, keep_ratio=0.0),), kind, layers)
    if budget < least - 1e-6:
        with pytest.raises(InputError, match="out of reach"):
            scaled_to_budget(*shape, target)
        return
    if budget < least + 1e-6:
        return
    stages = scaled_to_budget(*shape, target)
    assert target.cost(stages) == pytest.approx(budget, rel=0.01)
    assert all(a.layer < b.layer for a, b in itertools.pairwise(stages))
    assert all(a.keep_ratio >= b.keep_ratio for a, b in itertools.pairwise(stages))
    assert stages[-1].layer <= layers - 2


@settings(max_examples=50, deadline=None)
@given(power=st.floats(0.2, 5.0), kind=st.sampled_from(KINDS))
def test_a_budget_raises_all_ratios_to_one_power(power: float, kind: str) -> None:
    layers, ratios = [3, 9, 20], [0.7, 0.4, 0.1]
    raised = tuple(
        Stage(layer=layer, keep_ratio=ratio**power) for layer, ratio in zip(layers, ratios, strict=True)
    )
    found = raised_to_budget(layers, ratios, target_of(cost_of(raised, kind), kind))
    assert [stage.keep_ratio for stage in found] == pytest.approx(
        [stage.keep_ratio for stage in raised], abs=1e-4
    )


def test_layers_too_late_for_a_budget_move_forward_together() -> None:
    stages = scaled_to_budget([0.5, 0.75], [0.5, 0.25], target_of(0.25))
    first, second = (stage.layer for stage in stages)
    assert 0 < first < 8
    assert (second + 1) / (first + 1) == pytest.approx(25 / 17, rel=0.2)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 999),
    layers=st.integers(4, 32),
    budget=st.floats(0.1, 0.95),
    kind=st.sampled_from(KINDS),
    earliest=st.sampled_from([-1, 0]),
)
def test_random_stages_spend_the_budget(
    seed: int, layers: int, budget: float, kind: str, earliest: int
) -> None:
    target = target_of(budget, kind, layers)
    if budget < cost_of((Stage(layer=earliest, keep_ratio=0.0),), kind, layers):
        return
    stages = random_stages(target, np.random.default_rng(seed), earliest)
    assert target.cost(stages) == pytest.approx(budget, rel=1e-6)
    assert stages[0].layer >= earliest
    assert stages == random_stages(target, np.random.default_rng(seed), earliest)


def test_random_stages_may_stand_anywhere() -> None:
    drawn = [random_stages(target_of(0.3, layers=8), np.random.default_rng(seed), -1) for seed in range(60)]
    assert {stage.layer for stages in drawn for stage in stages} == set(range(-1, 7))
