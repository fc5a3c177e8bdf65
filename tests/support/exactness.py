"""Pruned generations of the first families, and the masked runs that they must equal."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from pruning_runtime import Record, find_backbone
from tests.support import greedy
from tests.support.masked_reference import dropped_positions, masked_logits
from tests.support.tiny_models import Inputs

STEPS = 5
STAGES = {
    "two stages": ((1, 0.5), (3, 0.2)),
    "to nothing": ((0, 0.3), (2, 0.1), (4, 0.0)),
}

generate = functools.partial(greedy.generate, steps=STEPS, suppress_tokens=None)


def reference(
    model: PreTrainedModel, inputs: Inputs, tokens: Tensor, record: Record | None, **options: Any
) -> Tensor:
    """The masked run; what was dropped is read off the record."""
    vision = find_backbone(model).vision_mask(inputs["input_ids"])
    stages = record.stages if record else []
    dropped = [
        (stage.layer + 1, dropped_positions(inputs, vision, stage.kept_positions())) for stage in stages
    ]
    return masked_logits(model, inputs, tokens, dropped, **options)
