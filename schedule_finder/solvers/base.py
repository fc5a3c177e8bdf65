"""What a solver is, and what every solver needs: stages that meet a budget exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pruning_runtime.accounting import budget_of
from pruning_runtime.backbone import DecoderShape
from pruning_runtime.schedule import Budget, BudgetKind, Stage
from schedule_finder.errors import InputError
from schedule_finder.profile_store import Profile

_CLOSE = 1e-9


@dataclass(frozen=True)
class BudgetTarget:
    """What a schedule may cost, and on which decoder and typical prompt.

    ``target`` is a fraction of the unpruned backbone's cost in the unit ``kind``.
    """

    kind: BudgetKind
    target: float
    shape: DecoderShape
    num_vision: float
    num_other: float

    def cost(self, stages: Sequence[Stage]) -> float:
        """Cost of ``stages`` in this budget's unit, as a fraction of the unpruned cost."""
        return float(getattr(self.account(stages), self.kind))

    def account(self, stages: Sequence[Stage]) -> Budget:
        """Cost of ``stages`` in every unit."""
        return budget_of(
            stages, self.shape, self.num_vision, self.num_other, kind=self.kind, target=self.target
        )

    def spend_rest(self, layers: Sequence[int], ratios: Sequence[float]) -> tuple[Stage, ...] | None:
        """Stages at ``layers`` with the given ratios but the last, which takes what the budget leaves.

        Returns None where even a last ratio of 0 costs too much, or the ratio before it would have to
        rise to spend the budget.
        """
        ceiling = ratios[-1] if ratios else 1.0

        def stages_with(last: float) -> tuple[Stage, ...]:
            return tuple(
                Stage(layer=layer, keep_ratio=ratio)
                for layer, ratio in zip(layers, (*ratios, last), strict=True)
            )

        low, high = 0.0, ceiling
        low_cost, high_cost = self.cost(stages_with(low)), self.cost(stages_with(high))
        if low_cost > self.target + _CLOSE or high_cost < self.target - _CLOSE:
            return None
        # The cost rises with the ratio and is linear in it but for FLOPs: the secant is exact or nearly so.
        middle = high if high_cost <= self.target else low
        while abs(excess := self.cost(stages_with(middle)) - self.target) > _CLOSE and high - low > _CLOSE:
            if excess < 0:
                low, low_cost = middle, self.target + excess
            else:
                high, high_cost = middle, self.target + excess
            step = (self.target - low_cost) / (high_cost - low_cost)
            middle = min(max(low + (high - low) * step, low), high)
        return stages_with(middle)

    def deepest_layer(self) -> int:
        """The last layer after which dropping *everything* still meets the budget.

        Raises `InputError` where no layer does, with the smallest budget that can be met.
        """
        fitting = [
            layer
            for layer in range(self.shape.num_layers - 1)
            if self.cost((Stage(layer=layer, keep_ratio=0.0),)) <= self.target + _CLOSE
        ]
        if not fitting:
            least = self.cost((Stage(layer=0, keep_ratio=0.0),))
            raise InputError(
                f"budget {self.target:.3g} ({self.kind}) is out of reach: scoring needs the first layer whole, "
                f"which costs {least:.3g} on this backbone; ask for at least {least:.3g} and at most 1"
            )
        return fitting[-1]


@dataclass(frozen=True)
class Solution:
    """Stages with the solver's reasons (JSON-able)."""

    stages: tuple[Stage, ...]
    evidence: dict[str, Any]


class Solver(ABC):
    """Turns a profile into stages; a subclass is one idea and names its source."""

    name: ClassVar[str]

    @abstractmethod
    def solve(
        self, profile: Profile, change_points: Sequence[int], budget: BudgetTarget, *, scorer: str
    ) -> Solution:
        """Stages within the budget.

        Args:
            profile: what text looked at, per sample and layer.
            change_points: first layers of new regimes, as decoder layer indices; may be empty.
            budget: what the stages may cost; met to within 1 %.
            scorer: the rule that will score tokens, one of the profile's score fields.
        """
