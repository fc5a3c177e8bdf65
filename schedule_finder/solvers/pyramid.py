"""Equal spacing, constant factor: PyramidDrop's shape, scaled to the budget."""

from __future__ import annotations

from schedule_finder.evidence import SolverEvidence
from schedule_finder.solvers.base import Problem, Solution, Solver
from schedule_finder.solvers.shapes import scaled_to_budget

PUBLISHED_LAYERS = (7, 15, 23)
"""Of 32: 8, 16 and 24 layers run first (PyramidDrop, arXiv 2410.17247)."""
FACTOR = 0.5


class Pyramid(Solver):
    """Stages after each quarter of the depth, each keeping the same share of the one before.

    The published factor is a half; the budget decides the factor. Where not even dropping everything at these
    layers meets the budget, all of them move towards the first layer in proportion.
    """

    name = "pyramid"

    def solve(self, problem: Problem) -> Solution:
        """See `Solver.solve`."""
        depths = [(layer + 1) / 32 for layer in PUBLISHED_LAYERS]
        ratios = [FACTOR ** (number + 1) for number in range(len(depths))]
        stages = scaled_to_budget(depths, ratios, problem.budget)
        evidence = SolverEvidence(solver=self.name, source="PyramidDrop, arXiv 2410.17247")
        return Solution(stages, problem.policy, evidence)
