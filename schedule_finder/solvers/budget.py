"""What a schedule may cost, and stages that spend it exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pruning_runtime.costs import (
    budget_of,
    feature_scoring_share,
    layer_flops,
    pre_decoder_share,
    prefill_flops,
    processed_ratios,
    scores_before_decoder,
)
from pruning_runtime.geometry import DecoderShape
from pruning_runtime.schedule import Budget, BudgetKind, Stage
from pruning_runtime.scorers import find_scorer
from schedule_finder.errors import InputError, OutOfReach
from schedule_finder.measuring.latency_model import LatencyModel
from schedule_finder.measuring.token_policy import PAPER_POLICY, TokenPolicy

_CLOSE = 1e-9


@dataclass(frozen=True)
class BudgetTarget:
    """What a schedule may cost, and on which decoder and typical prompt.

    ``target`` is a fraction of the unpruned backbone's cost in the unit ``kind``; a ``latency`` budget needs
    the model of what this device takes.
    """

    kind: BudgetKind
    target: float
    shape: DecoderShape
    num_vision: float
    num_other: float
    latency: LatencyModel | None = None
    scoring_layers: Sequence[int] | None = None
    """Decoder layers whose attention can score tokens; None: all."""
    policy: TokenPolicy = PAPER_POLICY
    """Whose scorers the stages are charged with."""

    def __post_init__(self) -> None:
        if self.kind == "latency" and self.latency is None:
            raise InputError(
                "budget kind latency: nothing was measured on this device yet; run the command where the "
                "backbone can be loaded"
            )

    def stage_layers(self, earliest: int = 0) -> list[int]:
        """Layers of possible stages from ``earliest`` on, rising: those that can score, without the last.

        -1, before the decoder, needs the attention of layer 0 if its scorer does.
        """
        layers = range(self.shape.num_layers) if self.scoring_layers is None else self.scoring_layers
        usable = [layer for layer in layers if earliest <= layer <= self.shape.num_layers - 2]
        reads_attention = find_scorer(self.policy.before_decoder).needs_attention
        return [-1, *usable] if earliest < 0 and (0 in layers or not reads_attention) else usable

    def under(self, policy: TokenPolicy) -> BudgetTarget:
        """The same budget for stages with the scorers of ``policy``."""
        return replace(self, policy=policy)

    def cost(self, stages: Sequence[Stage]) -> float:
        """Cost of ``stages`` in this budget's unit, as a fraction of the unpruned cost."""
        return float(getattr(self.account(stages), self.kind))

    def account(self, stages: Sequence[Stage]) -> Budget:
        """Cost of ``stages`` in every unit, scored as `policy` says.

        A stage before the decoder that is scored with attention is charged with scoring at layer 0
        (`scores_before_decoder`), a stage that is scored with hidden states with its comparisons.
        """
        stages, scorer = self.policy.apply(stages), self.policy.scorer
        latency = None
        if self.latency is not None:
            tokens = [
                ratio * self.num_vision + self.num_other
                for ratio in processed_ratios(stages, self.shape.num_layers)
            ]
            took = self.latency.prefill_ms(tokens, len(stages)) + self._scoring_ms(stages)
            latency = took / self.full_ms
        return budget_of(
            stages,
            self.shape,
            self.num_vision,
            self.num_other,
            kind=self.kind,
            target=self.target,
            latency=latency,
            pre_decoder=scores_before_decoder(stages, scorer),
            scorer=scorer,
        )

    @property
    def full_ms(self) -> float:
        """Milliseconds of the unpruned decoder, by the latency model."""
        assert self.latency is not None
        return self.latency.prefill_ms([self._prompt] * self.shape.num_layers, 0)

    @property
    def stage_cost(self) -> float:
        """What a stage costs beside the layers, as a fraction of the unpruned cost: its own time under ``latency``."""
        if self.kind != "latency":
            return 0.0
        assert self.latency is not None
        return self.latency.stage_ms / self.full_ms

    @property
    def _prompt(self) -> float:
        return self.num_vision + self.num_other

    def _scoring_share(self, stages: Sequence[Stage]) -> float:
        """Cost of scoring that comes on top of the layers, as a share of a layer's linear maps over the whole prompt."""
        stages = self.policy.apply(stages)
        projected = scores_before_decoder(stages, self.policy.scorer)
        return (pre_decoder_share(self.shape) if projected else 0.0) + feature_scoring_share(
            stages, self.policy.scorer, self.shape, self.num_vision, self.num_other
        )

    def _scoring_ms(self, stages: Sequence[Stage]) -> float:
        """Milliseconds of `_scoring_share`: its share of a layer's time."""
        assert self.latency is not None
        return self._scoring_share(stages) * self.latency.prefill_ms([self._prompt], 0)

    def layer_costs(self, ratios: np.ndarray) -> np.ndarray:
        """What each layer costs if it computes that ratio of the vision tokens, ``[num_layers, ratios]``.

        They sum up to `cost`, except for `stage_cost` and for scoring with hidden states inside
        the decoder. Fewer tokens in the first layer add the cost of scoring before the decoder.
        """
        layers, first = self.shape.num_layers, (Stage(layer=-1, keep_ratio=0.0),)
        tokens = ratios * self.num_vision + self.num_other
        weights, pre_decoder = np.ones(layers), 0.0
        if self.kind == "processed":
            one = ratios / layers
            pre_decoder = self._scoring_share(first) / layers
        elif self.kind == "published":
            # A stage's own layer counts at its size after pruning, so each layer counts as the next one.
            one = ratios / layers
            weights[0], weights[-1] = 0.0, 2.0
        elif self.kind == "kv":
            one = tokens / self._prompt / layers
        elif self.kind == "flops":
            full = prefill_flops(self.shape, [self._prompt] * layers)
            one = np.transpose([layer_flops(self.shape, [count] * layers) for count in tokens]) / full
            nothing_kept = prefill_flops(self.shape, [self.num_other] * layers)
            pre_decoder = self.cost(first) - nothing_kept / full
        else:
            assert self.latency is not None
            one = np.array([self.latency.prefill_ms([count], 0) for count in tokens]) / self.full_ms
            pre_decoder = self._scoring_ms(first) / self.full_ms
        costs = weights[:, None] * one
        costs[0, ratios < 1] += pre_decoder
        return costs

    def spend_rest(self, layers: Sequence[int], ratios: Sequence[float]) -> tuple[Stage, ...] | None:
        """Stages at ``layers`` with the given ratios but the last, which takes what the budget leaves.

        Returns None where a last ratio of 0 costs too much, where the last ratio would have to be above the one
        before it to spend the budget, or where one of the layers cannot score tokens.
        """
        if not set(layers) <= set(self.stage_layers(-1)):
            return None
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

    def spend_first(self, first: int, end: int) -> tuple[Stage, ...] | None:
        """A stage after ``first`` whose ratio spends the budget, and all other tokens out after ``end``.

        Returns None where the budget pays for all tokens up to there, or for none of them, or where one of the layers
        cannot score tokens.
        """
        if not {first, end} <= set(self.stage_layers(-1)):
            return None

        def stages_with(ratio: float) -> tuple[Stage, ...]:
            return Stage(layer=first, keep_ratio=ratio), Stage(layer=end, keep_ratio=0.0)

        low, high = 0.0, 1.0
        if not self.cost(stages_with(low)) <= self.target < self.cost(stages_with(high)):
            return None
        while high - low > _CLOSE:
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(stages_with(middle)) <= self.target else (low, middle)
        return stages_with(low)

    def deepest_layer(self, earliest: int = 0) -> int:
        """The last of `stage_layers` after which dropping *everything* still meets the budget.

        Raises `OutOfReach` where none does, with the smallest budget that can be met.
        """
        usable = self.stage_layers(earliest)
        if not usable:
            raise OutOfReach("no decoder layer but the last can score tokens; no stage is possible")
        fitting = [
            layer
            for layer in usable
            if self.cost((Stage(layer=layer, keep_ratio=0.0),)) <= self.target + _CLOSE
        ]
        if not fitting:
            first = usable[0]
            least = self.cost((Stage(layer=first, keep_ratio=0.0),))
            needs = "the first layer whole" if first == 0 else f"layers 0 to {first} whole"
            if first == -1:
                needs = "the first layer's queries, keys and values"
            raise OutOfReach(
                f"budget {self.target:.3g} ({self.kind}) is out of reach: scoring needs {needs}, "
                f"which costs {least:.3g} on this backbone; ask for at least {least:.3g} and at most 1"
            )
        return fitting[-1]
