"""FitPrune's rule: every layer may lose the same small share of attention."""

from __future__ import annotations

import numpy as np

from pruning_runtime.schedule import Stage
from schedule_finder.evidence import SolverEvidence
from schedule_finder.signals import carried_by_best, in_any_order, spread, tokens_to_carry
from schedule_finder.solvers.base import Problem, Solution, Solver
from schedule_finder.solvers.budget import BudgetTarget
from schedule_finder.solvers.shapes import raised_to_budget

_STEPS = 50
_MOST_SAMPLES = 1024
"""Curves over all tokens are held, 150 MB at 32 layers and 576 tokens."""
LEAST_DROP = 0.01
"""Share of the tokens that a stage must drop to be worth its scoring pass."""


class FitPruneEvidence(SolverEvidence):
    """``alpha``: the share of attention on vision that every layer may lose."""

    alpha: float


class FitPrune(Solver):
    """After each layer the tokens leave that together carry at most ``alpha`` of its attention on vision.

    One ``alpha`` for all layers, found by bisection so that the budget is met (FitPrune, arXiv 2409.10197). The
    published rule uses attention from text and attention among vision tokens; a profile holds the former,
    from the text queries. Ratios are means over samples.
    """

    name = "fitprune"

    def solve(self, problem: Problem) -> Solution:
        """See `Solver.solve`; evidence holds ``alpha``."""
        budget = problem.budget
        budget.deepest_layer()  # refuses what no stages can meet
        layers = problem.profile.layers
        some = spread(problem.profile.maps, _MOST_SAMPLES)
        curves = [carried_by_best(sample) for _, sample in in_any_order(some)]
        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            alpha = (low + high) / 2
            if budget.cost(_stages(layers, _ratios(curves, alpha), budget)) > budget.target:
                low = alpha
            else:
                high = alpha
        stages = _stages(layers, _ratios(curves, high), budget)
        # Stages appear or disappear at once as alpha changes; what remains of the budget goes to all stages.
        stages = raised_to_budget(
            [stage.layer for stage in stages], [stage.keep_ratio for stage in stages], budget
        )
        return Solution(
            stages,
            problem.policy,
            FitPruneEvidence(solver=self.name, source="FitPrune, arXiv 2409.10197", alpha=high),
        )


def _ratios(curves: list[np.ndarray], alpha: float) -> np.ndarray:
    """Mean share of the tokens that each layer needs to carry ``1 - alpha`` of its attention, ``[layers]``."""
    return np.mean([tokens_to_carry(curve, 1 - alpha) / curve.shape[1] for curve in curves], axis=0)


def _stages(layers: list[int], ratios: np.ndarray, budget: BudgetTarget) -> tuple[Stage, ...]:
    """A stage after each layer that drops at least `LEAST_DROP`; ratios never rise again."""
    stages: list[Stage] = []
    kept = 1.0
    for layer, ratio in zip(layers, ratios, strict=True):
        if layer <= budget.shape.num_layers - 2 and ratio <= kept - LEAST_DROP:
            kept = float(ratio)
            stages.append(Stage(layer=layer, keep_ratio=kept))
    return tuple(stages)
