"""What one pruned prompt cost, from what the runtime recorded about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pruning_runtime import Schedule
from pruning_runtime.costs import feature_scoring_flops, feature_scoring_share, prefill_flops
from pruning_runtime.geometry import DecoderShape


@dataclass(frozen=True)
class PromptCost:
    """Of the decoder's prefill of one prompt, scoring included.

    Attributes:
        computed: vision tokens that the layers computed, summed over layers.
        flops: FLOPs.
    """

    computed: float
    flops: float


def prompt_cost(
    schedule: Schedule,
    shape: DecoderShape,
    vision_per_layer: Sequence[int],
    num_vision: int,
    num_other: int,
    pre_decoder_cost: float,
) -> PromptCost:
    """The cost of one row of a batch.

    Args:
        schedule: what was applied.
        shape: the decoder.
        vision_per_layer: vision tokens of the row that each layer computed.
        num_vision, num_other: tokens of the prompt.
        pre_decoder_cost: `Record.pre_decoder_cost` of the batch.
    """
    own = (schedule.stages, schedule.scorer.name, shape, num_vision, num_other)
    flops = prefill_flops(
        shape,
        [tokens + num_other for tokens in vision_per_layer],
        pre_decoder_tokens=num_vision + num_other if pre_decoder_cost else 0,
    )
    scoring = (pre_decoder_cost + feature_scoring_share(*own)) * num_vision
    return PromptCost(sum(vision_per_layer) + scoring, flops + feature_scoring_flops(*own))
