"""The paper's way: three layers where cumulative attention turns, ratios in the published proportion."""

from __future__ import annotations

from schedule_finder.solvers.base import Problem, Solution, Solver
from schedule_finder.solvers.shapes import scaled_to_budget

PUBLISHED_LAYERS = (1, 10, 20)
PUBLISHED_DEPTH = 32
PUBLISHED_RATIOS = (133 / 576, 27 / 576, 3 / 576)
"""LLaVA-1.5-7B at 64 tokens (AdaptInfer, arXiv 2508.06084)."""


class Paper(Solver):
    """Layers read off `token_curve`, the first one early as published; ratios as published, scaled to the budget.

    The paper prunes after layer 1 and at two turning points behind it. Where the detector finds fewer, the
    published layers, scaled to the depth, stand in, and the evidence says so.
    """

    name = "paper"
    detector = "token_curve"

    def solve(self, problem: Problem) -> Solution:
        """See `Solver.solve`."""
        depth = problem.budget.shape.num_layers
        turns = [point - 1 for point in problem.change_points if 2 <= point <= depth - 1]
        found = len(turns) >= 2
        layers, of = ([1, *turns[:2]], depth) if found else (PUBLISHED_LAYERS, PUBLISHED_DEPTH)
        places = [(layer + 1) / of for layer in layers]
        stages = scaled_to_budget(places, PUBLISHED_RATIOS, problem.budget)
        return Solution(
            stages,
            problem.rule,
            {
                "solver": self.name,
                "source": "AdaptInfer, arXiv 2508.06084",
                "placed_by": "change points" if found else "published layers, scaled to the depth",
            },
        )
