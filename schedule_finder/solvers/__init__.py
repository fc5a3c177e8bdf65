"""Profile, change points and a budget in; stages out: one idea per file."""

from __future__ import annotations

from schedule_finder.solvers.base import Problem, Solution, Solver
from schedule_finder.solvers.budget import BudgetTarget
from schedule_finder.solvers.dop import Dop
from schedule_finder.solvers.fitprune import FitPrune
from schedule_finder.solvers.grid import Grid
from schedule_finder.solvers.paper import Paper
from schedule_finder.solvers.pyramid import Pyramid
from schedule_finder.solvers.retained import Retained
from schedule_finder.solvers.sensitivity import Sensitivity

SOLVERS: dict[str, type[Solver]] = {
    solver.name: solver for solver in (Sensitivity, Retained, Paper, Pyramid, FitPrune, Dop, Grid)
}
DEFAULT_SOLVER = Sensitivity.name

__all__ = ["DEFAULT_SOLVER", "SOLVERS", "BudgetTarget", "Problem", "Solution", "Solver"]
