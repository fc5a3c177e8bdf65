"""Profile, change points and a budget in; stages out: one idea per file."""

from __future__ import annotations

from schedule_finder.solvers.base import BudgetTarget, Solution, Solver
from schedule_finder.solvers.retained import Retained

SOLVERS: dict[str, type[Solver]] = {solver.name: solver for solver in (Retained,)}
DEFAULT_SOLVER = Retained.name

__all__ = ["DEFAULT_SOLVER", "SOLVERS", "BudgetTarget", "Solution", "Solver"]
