"""Brute force on the real model: the reference for other solvers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from pruning_runtime.schedule import Stage
from schedule_finder.errors import InputError
from schedule_finder.evidence import SolverEvidence
from schedule_finder.intervals import rounded_mean
from schedule_finder.measuring.answer_change import answer_change
from schedule_finder.solvers.base import Problem, Solution, Solver
from schedule_finder.solvers.budget import BudgetTarget

RATIOS = (0.75, 0.5, 0.35, 0.2, 0.1, 0.04)
MOST_STAGES = 3
ROUNDS = ((32, 40), (128, 8), (None, 1))
"""Samples that each round measures on (None: all), and how many schedules it leaves."""


class Grid(Solver):
    """Every choice of up to three layers and ratios on a grid, the last ratio spending the budget exactly.

    Measured as answer change: all of them on few samples, the best on more and more, so that thousands of schedules
    remain affordable. Slow by design.
    """

    name = "grid"
    before_decoder = True
    measures = True

    def solve(self, problem: Problem) -> Solution:
        """See `Solver.solve`."""
        if problem.answer_kl is None:
            raise InputError("solver grid measures on the model; run it where the backbone can be loaded")
        earliest = problem.profile.earliest_stage
        problem.budget.deepest_layer(earliest)
        candidates = list(every_schedule(problem.budget, earliest))
        tried = len(candidates)
        for samples, left in ROUNDS:
            values = [problem.answer_kl.measure(stages, problem.policy, samples) for stages in candidates]
            best = np.argsort([answer_change(kl).mean() for kl in values], kind="stable")[:left]
            candidates = [candidates[index] for index in best]
        own = values[best[0]]
        return Solution(
            candidates[0],
            problem.policy,
            SolverEvidence(
                solver=self.name,
                measured_schedules=tried,
                measured_change=rounded_mean(answer_change(own)),
                measured_kl=rounded_mean(own),
            ),
        )


def every_schedule(budget: BudgetTarget, earliest: int) -> Iterator[tuple[Stage, ...]]:
    """All stages of the grid that spend the budget, none before ``earliest``."""
    for number in range(1, MOST_STAGES + 1):
        for layers in itertools.combinations(budget.stage_layers(earliest), number):
            for ratios in itertools.combinations(RATIOS, number - 1):
                stages = budget.spend_rest(layers, ratios)
                if stages is not None:
                    yield stages
