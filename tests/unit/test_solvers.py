"""Solvers: budgets are met, the replay is what the runtime would do, the objective is what it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pruning_runtime.schedule import Stage
from schedule_finder.errors import InputError
from schedule_finder.profiling.store import Profile
from schedule_finder.solvers import SOLVERS, BudgetTarget, Problem
from schedule_finder.solvers.grid import every_schedule
from schedule_finder.solvers.retained import Replay, Retained, layer_weights
from schedule_finder.solvers.shapes import random_stages
from tests.support.solver_profiles import KINDS, POLICY, profile_of, random_profile, shape_of

PROFILE_ONLY = sorted(name for name, solver in SOLVERS.items() if not solver.measures)


def target_for(profile: Profile, kind: str, budget: float) -> BudgetTarget:
    shape = shape_of(profile.num_layers)
    return BudgetTarget(
        kind, budget, shape, profile.mean_vision, profile.mean_other, scoring_layers=profile.layers
    )


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(4, 16),
    points=st.sets(st.integers(1, 15), max_size=3),
    kind=st.sampled_from(KINDS),
    budget=st.floats(0.05, 1.0),
    solver=st.sampled_from(PROFILE_ONLY),
    seed=st.integers(0, 99),
    missing=st.sets(st.integers(0, 15), max_size=8),
)
def test_any_reachable_budget_is_met(
    layers: int, points: set[int], kind: str, budget: float, solver: str, seed: int, missing: set[int]
) -> None:
    first = min(set(range(layers - 1)) - missing, default=None)
    assume(first is not None)
    profile = random_profile(layers, seed, missing=missing)
    target = target_for(profile, kind, budget)
    change_points = sorted(point for point in points if point < layers)
    least = target.cost((Stage(layer=first, keep_ratio=0.0),))
    if budget < least - 1e-6:
        with pytest.raises(InputError, match="out of reach"):
            SOLVERS[solver]().solve(Problem(profile, change_points, target, POLICY))
        return
    if budget < least + 1e-6:
        return
    stages = SOLVERS[solver]().solve(Problem(profile, change_points, target, POLICY)).stages
    assert target.cost(stages) == pytest.approx(budget, rel=0.01)
    assert [stage.layer for stage in stages] == sorted({stage.layer for stage in stages})
    ratios = [stage.keep_ratio for stage in stages]
    assert ratios == sorted(ratios, reverse=True)
    assert stages[-1].layer <= layers - 2
    assert {stage.layer for stage in stages} <= set(profile.layers)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), data=st.data())
def test_the_replay_is_what_the_stages_do(seed: int, data: st.DataObject) -> None:
    missing = data.draw(st.sets(st.integers(1, 7), max_size=5))
    profile = random_profile(8, seed, samples=3, missing=missing)
    usable = [-1, *profile.layers]
    layers = sorted(data.draw(st.sets(st.sampled_from(usable), min_size=1, max_size=3)))
    ratios = sorted(
        data.draw(st.lists(st.floats(0, 1), min_size=len(layers), max_size=len(layers))), reverse=True
    )
    stages = [Stage(layer=layer, keep_ratio=ratio) for layer, ratio in zip(layers, ratios, strict=True)]
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(profile.layers)))
    expected = []
    for attention, scores in zip(profile.maps, profile.scores["text_guided"], strict=True):
        alive = list(range(attention.shape[1]))
        carried = 0.0
        for layer in range(-1, 8):
            if layer in profile.layers:
                row = profile.layers.index(layer)
                carried += weights[row] * attention[row, alive].sum() / attention[row].sum()
            for stage in stages:
                if stage.layer == layer:  # before the decoder layer 0 scores
                    by_score = scores[profile.layers.index(max(layer, 0))]
                    best = sorted(alive, key=lambda token: -by_score[token])
                    alive = sorted(best[: stage.kept(attention.shape[1])])
        expected.append(carried)
    assert Replay(profile, "text_guided", weights).retained(stages) == pytest.approx(
        np.mean(expected), abs=1e-5
    )


def test_keeping_everything_retains_everything() -> None:
    profile = random_profile(6, 0)
    replay = Replay(profile, "text_guided", layer_weights(profile, moving=True))
    assert replay.retained(()) == pytest.approx(1.0)
    assert replay.retained((Stage(layer=1, keep_ratio=1.0),)) == pytest.approx(1.0)


def test_layers_weigh_by_how_far_attention_moves() -> None:
    even = layer_weights(planted_profile(4), moving=False)
    assert even.tolist() == pytest.approx([1 / 12] * 12)
    moving = layer_weights(planted_profile(4), moving=True)
    assert moving.sum() == pytest.approx(1)
    # All that moves here moves into layer 4.
    assert moving[4] == pytest.approx(0.5 + 0.5 / 12, abs=1e-3)
    assert np.delete(moving, 4).max() == pytest.approx(0.5 / 12, abs=1e-3)


def planted_profile(change: int, layers: int = 12, tokens: int = 40) -> Profile:
    """Text looks at ten tokens before layer ``change`` and at ten others from then on."""
    rng = np.random.default_rng(0)
    maps = []
    for _ in range(20):
        order = rng.permutation(tokens)
        attention = np.full((layers, tokens), 1e-3, dtype=np.float32)
        attention[:change, order[:10]] = 0.09
        attention[change:, order[10:20]] = 0.09
        maps.append(attention)
    return profile_of(maps)


@pytest.mark.parametrize("change", [2, 4])
def test_pruning_waits_for_the_regime_it_serves(change: int) -> None:
    """Before the change the scores point at the wrong tokens: the best schedule prunes right at it."""
    profile = planted_profile(change)
    # Exactly enough for all layers up to the change, and ten tokens of forty from then on.
    budget = ((change + 1) + (11 - change) * 0.25) / 12
    target = target_for(profile, "processed", budget)
    solution = Retained().solve(Problem(profile, [change], target, POLICY))
    assert solution.stages[0].layer >= change
    assert solution.evidence.retained > 0.9
    assert solution.evidence.placed_by == "attention shifts"
    assert {stage.layer for stage in solution.evidence.at_regime_ends.stages} == {change - 1}
    assert solution.evidence.at_regime_ends.retained < 0.6
    early = target.spend_rest([0], ())
    replay = Replay(profile, "text_guided", layer_weights(profile, moving=True))
    assert replay.retained(early) < 0.6


def test_isolated_layers_score_only_where_the_budget_leaves_no_other() -> None:
    profile = random_profile(10, 0)
    target = target_for(profile, "processed", 0.5)
    free = SOLVERS["retained"]().solve(Problem(profile, [3], target, POLICY)).stages
    isolated = [stage.layer for stage in free]
    held = SOLVERS["retained"]().solve(Problem(profile, [3], target, POLICY, isolated=isolated)).stages
    assert held
    assert not {stage.layer for stage in held} & set(isolated)
    early = list(range(target.deepest_layer() + 1))
    forced = SOLVERS["retained"]().solve(Problem(profile, [3], target, POLICY, isolated=early)).stages
    assert forced == free


def test_stages_stand_at_ends_of_regimes_where_nothing_else_retains_more() -> None:
    """Nearly the same attention in all layers, on few tokens: any layer scores as well."""
    rng = np.random.default_rng(0)
    attention = rng.dirichlet(np.full(40, 0.03), 9)[:, None] * rng.uniform(0.99, 1.01, (9, 12, 40))
    profile = profile_of(list(attention.astype(np.float32)))
    target = target_for(profile, "processed", 0.6)
    solution = Retained().solve(Problem(profile, [5, 8], target, POLICY, isolated=[4]))
    assert {stage.layer for stage in solution.stages} <= {3, 7}
    assert solution.evidence.placed_by == "ends of regimes"
    assert solution.evidence.at_regime_ends.stages == list(solution.stages)


def test_without_change_points_the_budget_alone_decides_and_says_so() -> None:
    profile = planted_profile(6)
    solution = Retained().solve(Problem(profile, [], target_for(profile, "processed", 0.3), POLICY))
    assert solution.evidence.placed_by == "budget"
    assert solution.evidence.at_regime_ends is None
    assert len(set(solution.evidence.layer_weights)) == 1


def test_a_stage_that_gains_nothing_is_left_out() -> None:
    """Attention that never moves and is the same in every layer: one stage is enough."""
    rng = np.random.default_rng(0)
    profile = profile_of(
        [np.tile(rng.dirichlet(np.full(40, 0.1)), (12, 1)).astype(np.float32) for _ in range(9)]
    )
    solution = Retained().solve(Problem(profile, [], target_for(profile, "processed", 0.4), POLICY))
    assert len(solution.evidence.by_number_of_stages) > 1
    assert len(solution.stages) == 1


def test_more_stages_never_retain_less() -> None:
    profile = random_profile(12, 3, samples=20)
    by_number = (
        Retained()
        .solve(Problem(profile, [3, 6, 9], target_for(profile, "processed", 0.5), POLICY))
        .evidence.by_number_of_stages
    )
    assert set(by_number) == {"1", "2", "3"}
    assert by_number["2"].retained >= by_number["1"].retained - 0.01


def test_the_grid_begins_before_the_decoder_where_it_may() -> None:
    target = BudgetTarget("processed", 0.3, shape_of(6), 100, 20)
    later, all_of_them = (list(every_schedule(target, earliest)) for earliest in (0, -1))
    before = [stages for stages in all_of_them if stages not in later]
    assert {stages[0].layer for stages in before} == {-1}
    assert {len(stages) for stages in before} == {1, 2, 3}
    assert len(all_of_them) == len(before) + len(later)
    assert all(target.cost(stages) == pytest.approx(0.3) for stages in all_of_them)


@pytest.mark.parametrize(("layers", "earliest"), [([0, 1, 2], -1), ([1, 2], 0), ([3, 7], 0)])
def test_the_earliest_stage_of_a_profile(layers: list[int], earliest: int) -> None:
    profile = random_profile(8, 0)
    profile.meta["layers"] = layers
    assert profile.earliest_stage == earliest


def test_random_stages_use_layers_that_score() -> None:
    target = target_for(random_profile(10, 0, missing={0, 1, 3, 4, 5, 8}), "processed", 0.6)
    for seed in range(40):
        stages = random_stages(target, np.random.default_rng(seed), 0)
        assert {stage.layer for stage in stages} <= {2, 6, 7}


def test_spend_rest_refuses_what_cannot_be_spent() -> None:
    target = BudgetTarget("processed", 0.5, shape_of(10), 100, 20)
    assert target.spend_rest([6], ()) is None  # seven whole layers already cost more
    assert target.spend_rest([2, 4], (0.1,)) is None  # the rest would have to rise again
    (stage,) = target.spend_rest([4], ())
    assert stage.keep_ratio == pytest.approx(0.0, abs=1e-6)
