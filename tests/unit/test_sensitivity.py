"""The sensitivity table: what layers lose is recovered, files round-trip, the solver follows a planted need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pruning_runtime.accounting import processed_ratios
from pruning_runtime.schedule import Stage
from schedule_finder.divergence import Rule
from schedule_finder.errors import InputError
from schedule_finder.sensitivity import RATIOS, SensitivityTable
from schedule_finder.solvers import SOLVERS, BudgetTarget, Problem
from schedule_finder.solvers.sensitivity import neighbours, predict
from tests.unit.test_solvers import random_profile, shape_of

LAYERS = 10
RULE = Rule("text_guided", "merged")


def table_from(need: np.ndarray, samples: int = 8, noise: float = 0.0, seed: int = 0) -> SensitivityTable:
    """A table of a backbone in which layer ``k`` loses ``need[k] * (1 - ratio)``, whatever the others see."""
    behind = np.array([need[layer + 1 :].sum() for layer in range(len(need) - 1)])
    mean = behind[:, None] * (1 - np.array(RATIOS))
    rng = np.random.default_rng(seed)
    values = mean[..., None] * (1 + noise * rng.standard_normal((*mean.shape, samples)))
    return SensitivityTable(
        RULE,
        tuple(range(len(need) - 1)),
        RATIOS,
        tuple(f"{i}" for i in range(samples)),
        np.abs(values),
    )


def target_of(budget: float) -> BudgetTarget:
    return BudgetTarget("processed", budget, shape_of(LAYERS), 100, 20)


def test_what_layers_lose_is_recovered() -> None:
    need = np.random.default_rng(1).exponential(1.0, LAYERS)
    ratios = np.array([1.0, 0.8, 0.35, 0.2, 0.0])
    loss = table_from(need).layer_loss(LAYERS, ratios)
    # Layer 0 always sees everything.
    assert loss[1:] == pytest.approx(need[1:, None] * (1 - ratios), abs=1e-9)
    assert loss[0] == pytest.approx(0)


def test_unmeasured_layers_lie_between_measured_ones() -> None:
    need = np.full(LAYERS, 0.5)
    whole = table_from(need)
    some = [0, 2, 5, 8]
    part = SensitivityTable(whole.rule, tuple(some), whole.ratios, whole.sample_ids, whole.divergence[some])
    ratios = np.array([1.0, 0.35, 0.0])
    assert part.layer_loss(LAYERS, ratios) == pytest.approx(whole.layer_loss(LAYERS, ratios), abs=1e-9)


def test_no_layer_gains_from_seeing_less_later() -> None:
    """Noise may say that dropping later hurts more; what layers lose is never below zero."""
    table = table_from(np.full(LAYERS, 0.2), noise=2.0)
    assert table.layer_loss(LAYERS, np.linspace(1, 0, 7)).min() >= -1e-12


def test_samples_can_be_weighted() -> None:
    table = table_from(np.full(LAYERS, 0.5), noise=0.5)
    first = np.eye(8)[0] * 8
    alone = SensitivityTable(RULE, table.layers, RATIOS, ("0",), table.divergence[..., :1])
    ratios = np.array([0.35, 0.1])
    assert table.layer_loss(LAYERS, ratios, first) == pytest.approx(alone.layer_loss(LAYERS, ratios))


def test_a_prediction_is_the_sum_of_what_layers_lose() -> None:
    need = np.random.default_rng(2).exponential(1.0, LAYERS)
    stages = (Stage(layer=1, keep_ratio=0.35), Stage(layer=6, keep_ratio=0.1))
    ratios = np.array(processed_ratios(stages, LAYERS))
    assert predict(table_from(need), target_of(0.5), stages) == pytest.approx((need * (1 - ratios)).sum())


@pytest.mark.parametrize("needed", [3, 5])
def test_the_solver_cuts_behind_the_last_layer_that_needs_vision(needed: int) -> None:
    need = np.zeros(LAYERS)
    need[: needed + 1] = 1.0
    budget = (needed + 1) / LAYERS
    solution = SOLVERS["sensitivity"]().solve(
        Problem(random_profile(LAYERS, 0), (), target_of(budget), RULE, sensitivity=table_from(need))
    )
    assert solution.stages == (Stage(layer=needed, keep_ratio=0.0),)
    assert solution.evidence["predicted_kl"] == pytest.approx(0)
    # No doubt, whatever samples are drawn.
    assert solution.evidence["confidence"]["layers"] == {str(needed): 20}


def test_a_stage_more_is_taken_where_it_saves_enough() -> None:
    """Layers 0 to 3 need all, 4 to 6 some, the rest nothing: one stage would waste what the rest does not need."""
    need = np.array([1.0] * 4 + [0.3] * 3 + [0.0] * 3)
    table = table_from(need)
    solution = SOLVERS["sensitivity"]().solve(
        Problem(random_profile(LAYERS, 0), (), target_of(0.55), RULE, sensitivity=table)
    )
    # Of the three layers that need some, half of the tokens' worth, whichever of them sees it.
    assert len(solution.stages) == 2
    assert solution.stages[-1] == Stage(layer=solution.stages[-1].layer, keep_ratio=0.0)
    assert solution.evidence["predicted_kl"] == pytest.approx(0.3 * 1.5)
    # Where all layers behind the first stage need the same, one is enough.
    even = np.array([1.0] * 4 + [0.3] * 6)
    alone = SOLVERS["sensitivity"]().solve(
        Problem(random_profile(LAYERS, 0), (), target_of(0.7), RULE, sensitivity=table_from(even))
    )
    assert len(alone.stages) == 1


def test_doubt_shows() -> None:
    """Noisy samples disagree about the ratios; the bands say by how much."""
    need = np.linspace(1, 0.1, LAYERS)
    solution = SOLVERS["sensitivity"]().solve(
        Problem(
            random_profile(LAYERS, 0),
            (),
            target_of(0.4),
            RULE,
            sensitivity=table_from(need, noise=1.5),
        )
    )
    bands = solution.evidence["confidence"]
    assert bands["ratio_low"][0] == bands["ratio_high"][0] == 1
    assert any(high > low for low, high in zip(bands["ratio_low"], bands["ratio_high"], strict=True))
    assert len(bands["ratio_low"]) == LAYERS


def test_each_half_and_each_data_set_left_out_has_its_say() -> None:
    """One data set needs vision to layer 2, the other to layer 6: without either the schedule is the other's."""
    early, late = np.zeros(LAYERS), np.zeros(LAYERS)
    early[:3], late[:7] = 1.0, 1.0
    both = np.concatenate([table_from(early, 4).divergence, table_from(late, 4).divergence], axis=2)
    names = tuple(f"{source}@f:{i}" for source in ("pope", "docvqa") for i in range(4))
    table = SensitivityTable(RULE, tuple(range(LAYERS - 1)), RATIOS, names, both)
    solution = SOLVERS["sensitivity"]().solve(
        Problem(random_profile(LAYERS, 0), (), target_of(0.7), RULE, sensitivity=table)
    )
    parts = solution.evidence["confidence"]["parts"]
    assert set(parts) == {"first half", "second half", "without docvqa", "without pope"}
    assert parts["without pope"] == parts["second half"] == [{"layer": 6, "keep_ratio": 0.0}]
    assert all(stage["layer"] >= 2 for stage in parts["without docvqa"])
    assert parts["without docvqa"] == parts["first half"] != parts["second half"]


def test_without_a_table_the_solver_says_what_is_missing() -> None:
    with pytest.raises(InputError, match="nothing is measured yet"):
        SOLVERS["sensitivity"]().solve(Problem(random_profile(LAYERS, 0), (), target_of(0.4), RULE))


def test_neighbours_spend_the_same_budget() -> None:
    target = target_of(0.4)
    stages = target.spend_rest([1, 5], [0.5])
    found = neighbours(stages, target)
    assert len(found) >= 3
    for one in found:
        assert target.cost(one) == pytest.approx(0.4)
        assert one != stages
        if len(one) == len(stages):
            assert sum(a.layer != b.layer for a, b in zip(one, stages, strict=True)) <= 1
        else:
            assert {stage.layer for stage in one} < {stage.layer for stage in stages}
    assert any(len(one) < len(stages) for one in found)


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = table_from(np.full(LAYERS, 0.5), noise=1.0)
    table.save(tmp_path / "table.parquet")
    again = SensitivityTable.load(tmp_path / "table.parquet")
    assert (again.divergence == table.divergence).all()
    assert (again.rule, again.layers, again.ratios, again.sample_ids) == (
        table.rule,
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
