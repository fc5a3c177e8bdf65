"""Solver `dop`: on a loss that adds up it finds what brute force finds, within the budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pruning_runtime.schedule import Stage
from schedule_finder.errors import InputError
from schedule_finder.measuring.sensitivity_table import RATIOS, SensitivityTable
from schedule_finder.solvers import SOLVERS, BudgetTarget, Problem
from schedule_finder.solvers.dop import RATIO_GRID, Dop
from tests.support.solver_profiles import POLICY, random_profile, shape_of

LAYERS = 6
MEASURED = range(-1, LAYERS - 1)


def planted(seed: int) -> SensitivityTable:
    """Divergences of single stages: a share of the tokens may leave for nothing, a larger one at later layers."""
    rng = np.random.default_rng(seed)
    free = np.sort(rng.uniform(0.2, 0.95, len(MEASURED)))
    excess = np.clip(1 - np.array(RATIOS) - free[:, None], 0, None)
    mean = rng.gamma(2.0, 5.0, (len(MEASURED), 1)) * excess**2
    return SensitivityTable(POLICY, tuple(MEASURED), RATIOS, ("0", "1"), np.stack([mean, mean], 2))


def target_of(budget: float) -> BudgetTarget:
    return BudgetTarget("processed", budget, shape_of(LAYERS), 576, 64)


def total(table: SensitivityTable, stages: tuple[Stage, ...]) -> float:
    """The planted loss: every stage costs what it costs alone."""
    known = {(layer, 1.0): 0.0 for layer in table.layers}
    for row, layer in enumerate(table.layers):
        known |= {(layer, ratio): table.kl[row, column, 0] for column, ratio in enumerate(table.ratios)}
    ratios = sorted({ratio for _, ratio in known})
    return sum(
        np.interp(stage.keep_ratio, ratios, [known[stage.layer, ratio] for ratio in ratios])
        for stage in stages
    )


def solve(table: SensitivityTable | None, budget: float) -> tuple[tuple[Stage, ...], float | None]:
    problem = Problem(random_profile(LAYERS, 0), (), target_of(budget), POLICY, sensitivity=table)
    found = Dop().solve(problem)
    return found.stages, found.evidence.predicted_kl


@pytest.mark.parametrize("budget", [0.3, 0.55])
@pytest.mark.parametrize("seed", range(4))
def test_it_finds_the_least_sum_within_the_budget(seed: int, budget: float) -> None:
    table, target = planted(seed), target_of(budget)
    stages, predicted = solve(table, budget)
    assert target.cost(stages) == pytest.approx(budget, rel=0.01)
    every = [
        spent
        for number in (1, 2)
        for layers in itertools.combinations(target.stage_layers(-1), number)
        for ratios in itertools.combinations(RATIO_GRID, number - 1)
        if (spent := target.spend_rest(layers, ratios)) is not None
    ]
    assert predicted == pytest.approx(total(table, stages), abs=1e-5)
    assert predicted <= min(total(table, one) for one in every) + 1e-5


def test_it_stays_within_layers_that_were_measured() -> None:
    whole = planted(1)
    odd = SensitivityTable(POLICY, whole.layers[::2], RATIOS, whole.sample_ids, whole.kl[::2])
    stages, _ = solve(odd, 0.4)
    assert {stage.layer for stage in stages} <= set(odd.layers)


def test_without_a_table_it_says_what_is_missing() -> None:
    assert SOLVERS["dop"] is Dop
    with pytest.raises(InputError, match="solver dop: nothing is measured yet"):
        solve(None, 0.4)
