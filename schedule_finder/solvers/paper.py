"""The AdaptInfer paper's schedule: three layers at turning points, ratios in the published proportion."""

from __future__ import annotations

from schedule_finder.change_points.placement import candidate_layers
from schedule_finder.evidence import SolverEvidence
from schedule_finder.solvers.base import Problem, Solution, Solver
from schedule_finder.solvers.shapes import scaled_to_budget

PUBLISHED_LAYERS = (1, 10, 20)
PUBLISHED_DEPTH = 32
PUBLISHED_RATIOS = (133 / 576, 27 / 576, 3 / 576)
"""LLaVA-1.5-7B at 64 tokens (AdaptInfer, arXiv 2508.06084)."""


class Paper(Solver):
    """Layers from the detector `token_curve`, the first one early as published; published ratios, scaled.

    The paper prunes after layer 1 and at two later turning points. Where the detector finds fewer, the
    published layers, scaled to the depth, are used, and the evidence says so.
    """

    name = "paper"
    detector = "token_curve"

    def solve(self, problem: Problem) -> Solution:
        """See `Solver.solve`."""
        depth = problem.budget.shape.num_layers
        turns = candidate_layers([point for point in problem.change_points if 2 <= point < depth], depth)
        found = len(turns) >= 2
        layers, of = ([1, *turns[:2]], depth) if found else (PUBLISHED_LAYERS, PUBLISHED_DEPTH)
        depths = [(layer + 1) / of for layer in layers]
        stages = scaled_to_budget(depths, PUBLISHED_RATIOS, problem.budget)
        evidence = SolverEvidence(
            solver=self.name,
            source="AdaptInfer, arXiv 2508.06084",
            placed_by="change points" if found else "published layers, scaled to the depth",
        )
        return Solution(stages, problem.policy, evidence)
