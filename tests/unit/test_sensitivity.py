"""The sensitivity table: what layers lose is recovered, files round-trip, the solver follows a planted need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_runtime.costs import pre_decoder_share, processed_ratios
from pruning_runtime.schedule import Stage
from schedule_finder.errors import InputError, OutOfReach
from schedule_finder.measuring.sensitivity_table import RATIOS, SensitivityTable
from schedule_finder.solvers import SOLVERS, BudgetTarget, Problem
from schedule_finder.solvers.sensitivity import predict
from schedule_finder.solvers.whole_schedules import neighbours
from tests.support.planted_tables import LAYERS, POLICY, UNIT, table_from, target_of
from tests.support.solver_profiles import random_profile, shape_of


@pytest.mark.parametrize("earliest", [-1, 0])
def test_what_layers_lose_is_recovered(earliest: int) -> None:
    need = np.random.default_rng(1).exponential(1.0, LAYERS)
    ratios = np.array([1.0, 0.8, 0.35, 0.2, 0.0])
    loss = table_from(need, earliest=earliest).layer_loss(LAYERS, ratios)
    expected = UNIT * need[:, None] * (1 - ratios)
    if earliest == 0:  # layer 0 has to see everything
        expected[0] = [0, *[np.inf] * 4]
    assert loss == pytest.approx(expected, abs=1e-9)


def test_a_first_layer_that_was_not_measured_has_no_loss_to_be_predicted() -> None:
    table = table_from(np.full(LAYERS, 0.5))
    stages = (Stage(layer=-1, keep_ratio=0.5),)
    assert predict(table, target_of(0.5), stages) == np.inf
    assert predict(table, target_of(0.5), ()) == 0


def test_a_hybrid_whose_first_layers_do_not_attend_has_nothing_before_the_decoder() -> None:
    whole = table_from(np.full(LAYERS, 0.5))
    some = [2, 5, 8]
    hybrid = SensitivityTable(whole.policy, tuple(some), whole.ratios, whole.sample_ids, whole.kl[some])
    assert hybrid.earliest == 0
    loss = hybrid.layer_loss(LAYERS, np.array([1.0, 0.5]))
    assert loss[0].tolist() == [0, np.inf]
    assert np.isfinite(loss[1:]).all()


def test_where_every_other_layer_is_measured_the_first_counts_too() -> None:
    need = np.full(LAYERS, 0.5)
    whole = table_from(need, earliest=-1)
    some = [0, 1, 3, 6, 9]
    layers = tuple(whole.layers[index] for index in some)
    part = SensitivityTable(whole.policy, layers, whole.ratios, whole.sample_ids, whole.kl[some])
    ratios = np.array([1.0, 0.35, 0.0])
    assert part.layer_loss(LAYERS, ratios) == pytest.approx(whole.layer_loss(LAYERS, ratios), abs=1e-9)


def test_unmeasured_layers_lie_between_measured_ones() -> None:
    need = np.full(LAYERS, 0.5)
    whole = table_from(need)
    some = [0, 2, 5, 8]
    part = SensitivityTable(whole.policy, tuple(some), whole.ratios, whole.sample_ids, whole.kl[some])
    ratios = np.array([1.0, 0.35, 0.0])
    assert part.layer_loss(LAYERS, ratios) == pytest.approx(whole.layer_loss(LAYERS, ratios), abs=1e-9)


@pytest.mark.parametrize("earliest", [-1, 0])
def test_no_layer_gains_from_seeing_less_later(earliest: int) -> None:
    """Noise may say that dropping later hurts more; what layers lose is never below zero."""
    table = table_from(np.full(LAYERS, 0.2), noise=2.0, earliest=earliest)
    assert table.layer_loss(LAYERS, np.linspace(1, 0, 7)).min() >= -1e-12


@pytest.mark.parametrize("earliest", [-1, 0])
def test_the_last_layer_that_needs_vision_is_read_off_the_table(earliest: int) -> None:
    need = np.array([1.0] * 6 + [0.0] * 4)
    assert table_from(need, earliest=earliest).last_needed(UNIT / 2) == 5
    assert table_from(np.array([1.0] * 6 + [0.3] * 4), earliest=earliest).last_needed(UNIT / 2) == 8
    assert table_from(np.ones(LAYERS), earliest=earliest).last_needed(UNIT / 2) is None
    if earliest == -1:  # a backbone that needs no vision
        assert table_from(np.zeros(LAYERS), earliest=-1).last_needed(0.02) is None


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5])
def test_tokens_that_leave_twice_spend_the_budget(budget: float) -> None:
    target = target_of(budget)
    stages = target.spend_first(-1, 5)
    assert stages is not None
    first, last = stages
    assert (first.layer, last) == (-1, Stage(layer=5, keep_ratio=0.0))
    assert target.cost(stages) == pytest.approx(budget, abs=1e-6)
    assert first.keep_ratio > budget  # six of ten layers
    assert target_of(0.7).spend_first(-1, 5) is None
    assert target.spend_first(-1, LAYERS - 1) is None


def test_samples_can_be_weighted() -> None:
    table = table_from(np.full(LAYERS, 0.5), noise=0.5)
    first = np.eye(8)[0] * 8
    alone = SensitivityTable(POLICY, table.layers, RATIOS, ("0",), table.kl[..., :1])
    ratios = np.array([0.35, 0.1])
    assert table.layer_loss(LAYERS, ratios, first) == pytest.approx(alone.layer_loss(LAYERS, ratios))


def test_a_prediction_is_the_sum_of_what_layers_lose() -> None:
    need = np.random.default_rng(2).exponential(1.0, LAYERS)
    stages = (Stage(layer=1, keep_ratio=0.35), Stage(layer=6, keep_ratio=0.1))
    ratios = np.array(processed_ratios(stages, LAYERS))
    assert predict(table_from(need), target_of(0.5), stages) == pytest.approx(
        UNIT * (need * (1 - ratios)).sum()
    )


@pytest.mark.parametrize("needed", [3, 5])
def test_the_solver_cuts_behind_the_last_layer_that_needs_vision(needed: int) -> None:
    need = np.zeros(LAYERS)
    need[: needed + 1] = 1.0
    budget = (needed + 1) / LAYERS
    solution = SOLVERS["sensitivity"]().solve(
        Problem(random_profile(LAYERS, 0), (), target_of(budget), POLICY, sensitivity=table_from(need))
    )
    assert solution.stages == (Stage(layer=needed, keep_ratio=0.0),)
    assert solution.evidence.predicted_change == pytest.approx(0)
    # No doubt, whatever samples are drawn.
    assert solution.evidence.confidence.layers == {str(needed): 20}


def solved(table: SensitivityTable, target: BudgetTarget) -> tuple[Stage, ...]:
    return (
        SOLVERS["sensitivity"]()
        .solve(Problem(random_profile(LAYERS, 0), (), target, POLICY, sensitivity=table))
        .stages
    )


def test_tokens_leave_before_a_first_layer_that_needs_none_where_the_budget_is_tight() -> None:
    """Layers 1 to 5 need something and the first nothing; a whole first layer would take what they need."""
    need = np.array([0.0] + [1.0] * 5 + [0.0] * 4)
    table, target = table_from(need, earliest=-1), target_of(0.2)
    first, *_ = stages = solved(table, target)
    assert first.layer == -1
    assert target.cost(stages) == pytest.approx(0.2, abs=1e-9)
    # Two of ten layers less the scoring, for six layers: .285 of the tokens each, .28 on the grid. Behind a whole first
    # layer there is one left for five.
    assert predict(table, target, stages) == pytest.approx(UNIT * 5 * (1 - 0.28))
    later = solved(table_from(need), target)
    assert predict(table, target, later) == pytest.approx(UNIT * 5 * (1 - 0.2))


@pytest.mark.parametrize("first_needs", [0.0, 1.0])
def test_no_stage_before_the_decoder_where_it_does_not_pay(first_needs: float) -> None:
    """The budget has room for the two layers that need something: nothing to gain, whether the first needs any or not."""
    need = np.array([first_needs, 1.0] + [0.0] * 8)
    stages = solved(table_from(need, earliest=-1), target_of(0.2))
    assert stages == (Stage(layer=1, keep_ratio=0.0),)


def test_the_smallest_budget_is_the_first_layer_or_scoring_before_it() -> None:
    need = np.full(LAYERS, 0.5)
    least = pre_decoder_share(shape_of(LAYERS)) / LAYERS
    assert least < 0.05 < 0.1  # a layer
    with pytest.raises(OutOfReach, match=r"the first layer whole, which costs 0\.1 "):
        solved(table_from(need), target_of(0.09))
    with pytest.raises(OutOfReach, match=rf"queries, keys and values, which costs {least:.3g} "):
        solved(table_from(need, earliest=-1), target_of(least - 0.001))
    for budget in (least, least + 1e-6, 0.05, 0.09):
        stages = solved(table_from(need, earliest=-1), target_of(budget))
        assert stages[0].layer == -1
        assert target_of(budget).cost(stages) == pytest.approx(budget, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    budget=st.floats(0.04, 0.9),
    kind=st.sampled_from(("processed", "flops", "kv", "published")),
)
def test_any_reachable_budget_is_met_with_a_stage_before_the_decoder(
    seed: int, budget: float, kind: str
) -> None:
    need = np.random.default_rng(seed).exponential(1.0, LAYERS)
    target = BudgetTarget(kind, budget, shape_of(LAYERS), 100, 20)
    table = table_from(need, samples=3, earliest=-1)
    if budget < target.cost((Stage(layer=-1, keep_ratio=0.0),)):
        with pytest.raises(OutOfReach):
            solved(table, target)
        return
    assert target.cost(solved(table, target)) == pytest.approx(budget, rel=0.01)


def test_a_stage_more_is_taken_where_it_saves_enough() -> None:
    """Layers 0 to 3 need all, 4 to 6 some, the rest nothing: one stage would waste what the rest does not need."""
    need = np.array([1.0] * 4 + [0.3] * 3 + [0.0] * 3)
    table = table_from(need)
    solution = SOLVERS["sensitivity"]().solve(
        Problem(random_profile(LAYERS, 0), (), target_of(0.55), POLICY, sensitivity=table)
    )
    # Of the three layers that need some, half of the tokens' worth, whichever of them sees it.
    assert len(solution.stages) == 2
    assert solution.stages[-1] == Stage(layer=solution.stages[-1].layer, keep_ratio=0.0)
    assert solution.evidence.predicted_change == pytest.approx(UNIT * 0.3 * 1.5)
    # Where all layers behind the first stage need the same, one is enough.
    even = np.array([1.0] * 4 + [0.3] * 6)
    alone = SOLVERS["sensitivity"]().solve(
        Problem(random_profile(LAYERS, 0), (), target_of(0.7), POLICY, sensitivity=table_from(even))
    )
    assert len(alone.stages) == 1


def test_the_band_is_wide_where_samples_disagree() -> None:
    """Noisy samples disagree about the ratios; the bands say by how much."""
    need = np.linspace(1, 0.1, LAYERS)
    solution = SOLVERS["sensitivity"]().solve(
        Problem(
            random_profile(LAYERS, 0),
            (),
            target_of(0.4),
            POLICY,
            sensitivity=table_from(need, noise=1.5),
        )
    )
    bands = solution.evidence.confidence
    assert bands.ratio_low[0] == bands.ratio_high[0] == 1
    assert any(high > low for low, high in zip(bands.ratio_low, bands.ratio_high, strict=True))
    assert len(bands.ratio_low) == LAYERS


def test_schedules_of_each_half_and_without_each_data_set_are_reported() -> None:
    """One data set needs vision to layer 2, the other to layer 6: without either the schedule is the other's."""
    early, late = np.zeros(LAYERS), np.zeros(LAYERS)
    early[:3], late[:7] = 1.0, 1.0
    both = np.concatenate([table_from(early, 4).kl, table_from(late, 4).kl], axis=2)
    names = tuple(f"{source}@f:{i}" for source in ("pope", "docvqa") for i in range(4))
    table = SensitivityTable(POLICY, tuple(range(LAYERS - 1)), RATIOS, names, both)
    solution = SOLVERS["sensitivity"]().solve(
        Problem(random_profile(LAYERS, 0), (), target_of(0.7), POLICY, sensitivity=table)
    )
    parts = solution.evidence.confidence.variation
    assert set(parts) == {"first half", "second half", "without docvqa", "without pope"}
    assert parts["without pope"] == parts["second half"] == [Stage(layer=6, keep_ratio=0.0)]
    assert all(stage.layer >= 2 for stage in parts["without docvqa"])
    assert parts["without docvqa"] == parts["first half"] != parts["second half"]


def test_without_a_table_the_solver_says_what_is_missing() -> None:
    with pytest.raises(InputError, match="nothing is measured yet"):
        SOLVERS["sensitivity"]().solve(Problem(random_profile(LAYERS, 0), (), target_of(0.4), POLICY))


@pytest.mark.parametrize("earliest", [-1, 0])
def test_neighbours_spend_the_same_budget(earliest: int) -> None:
    target = target_of(0.4)
    stages = target.spend_rest([earliest + 1, 5], [0.5])
    found = neighbours(stages, target, earliest)
    assert min(one[0].layer for one in found) == earliest
    assert all(one[0].layer >= 0 for one in neighbours(stages, target, 0))
    assert len(found) >= 3
    for one in found:
        assert target.cost(one) == pytest.approx(0.4)
        assert one != stages
        if len(one) == len(stages):
            assert sum(a.layer != b.layer for a, b in zip(one, stages, strict=True)) <= 1
        else:
            assert {stage.layer for stage in one} < {stage.layer for stage in stages}
    assert any(len(one) < len(stages) for one in found)


@pytest.mark.parametrize("earliest", [-1, 0])
def test_a_table_survives_its_file(tmp_path: Path, earliest: int) -> None:
    table = replace(
        table_from(np.full(LAYERS, 0.5), noise=1.0, earliest=earliest), answer_tokens=4 + earliest
    )
    table.save(tmp_path / "table.parquet")
    again = SensitivityTable.load(tmp_path / "table.parquet")
    assert (again.kl == table.kl).all()
    assert again.answer_tokens == table.answer_tokens
    assert (again.policy, again.layers, again.ratios, again.sample_ids) == (
        table.policy,
        table.layers,
        table.ratios,
        table.sample_ids,
    )


@pytest.mark.parametrize("content", [b"", b"not parquet"])
def test_a_broken_table_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"table\.parquet"):
        SensitivityTable.load(path)
