"""What a solver is: a problem in, stages and typed evidence out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pruning_runtime.schedule import Stage
from schedule_finder.evidence import RuleProbe, SolverEvidence
from schedule_finder.profiling.store import Profile
from schedule_finder.solvers.budget import BudgetTarget

if TYPE_CHECKING:
    from schedule_finder.measuring.answer_kl import AnswerKL
    from schedule_finder.measuring.sensitivity_table import SensitivityTable
    from schedule_finder.measuring.token_policy import TokenPolicy


@dataclass(frozen=True)
class Solution:
    """Stages, what they do with their tokens, and why."""

    stages: tuple[Stage, ...]
    policy: TokenPolicy
    evidence: SolverEvidence


@dataclass(frozen=True)
class Problem:
    """What a solver may use.

    Attributes:
        profile: attention of the text queries to vision tokens, per sample and layer.
        change_points: first layers of new regimes, as decoder layer indices; may be empty.
        budget: what the stages may cost.
        policy: the scorer (one of the profile's score fields), and what happens to dropped tokens.
        alternatives: policies that a solver which measures may choose instead.
        controls: policies whose rules read nothing; measured beside the others.
        may_change: whether a control may be chosen where it is not worse; otherwise the evidence says so.
        rules: scorers that were compared on single stages; None where the user chose one.
        sensitivity: answer KL of single stages; only for solvers that need it.
        answer_kl: measures schedules on the model; None without a model.
        isolated: layers that attend to other tokens than the layers around them; not to score with.
    """

    profile: Profile
    change_points: Sequence[int]
    budget: BudgetTarget
    policy: TokenPolicy
    alternatives: Sequence[TokenPolicy] = ()
    controls: Sequence[TokenPolicy] = ()
    may_change: bool = True
    rules: RuleProbe | None = None
    sensitivity: SensitivityTable | None = None
    answer_kl: AnswerKL | None = None
    isolated: Sequence[int] = ()


class Solver(ABC):
    """Turns a problem into stages; a subclass is one idea and names its source."""

    name: ClassVar[str]
    detector: ClassVar[str | None] = None
    """Whose change points it follows; None: the run's default."""
    needs_sensitivity: ClassVar[bool] = False
    before_decoder: ClassVar[bool] = False
    """Whether its first stage may be before the decoder."""
    measures: ClassVar[bool] = False
    """Whether it uses `Problem.answer_kl`."""

    @abstractmethod
    def solve(self, problem: Problem) -> Solution:
        """Stages within the budget, which they meet to within 1 %. Raises `InputError` where none can."""
