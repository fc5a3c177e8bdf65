"""FLOPs of every small family against `torch.utils.flop_counter`, unpruned and pruned.

The counter sees the eager kernel, which computes all pairs of queries and keys, also those behind the causal mask.
`prefill_flops` counts the causal half. The comparison therefore takes the counts of `DecoderShape` per token and per
pair, with all pairs; `test_costs.py` checks by hand that `prefill_flops` takes half of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from pruning_runtime import find_backbone, pruned
from pruning_runtime.geometry import DecoderShape
from tests.support.schedules import schedule_for
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import FAMILIES, IMAGE, Inputs

TOLERANCE = 0.02
WHOLE_CHUNK = 64
"""Recurrent layers pad to whole chunks of tokens; their prompts here fill them."""

EVERY_FAMILY: dict[str, Any] = {**FAMILIES, **FAMILIES_A, **FAMILIES_B}


def build(name: str) -> PreTrainedModel:
    """The family with the eager kernel, and experts that are looped over, which the counter sees."""
    family = EVERY_FAMILY[name]
    if not getattr(family, "available", True) or getattr(family, "missing", None):
        pytest.skip(f"transformers {transformers.__version__} does not have this class")
    model = family.build(attention="eager")
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    return model


def prompt(name: str, model: PreTrainedModel) -> Inputs:
    """One row; with recurrent layers, of two whole chunks."""
    family = EVERY_FAMILY[name]
    if not getattr(family, "recurrent", False):
        return family.batch((2,))
    inputs = family.batch((6,))
    missing = 2 * WHOLE_CHUNK - inputs["input_ids"].shape[1]
    assert missing > 0
    text = torch.full((1, missing), 5)
    longer = dict(inputs, input_ids=torch.cat([inputs["input_ids"], text], 1))
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    if "mm_token_type_ids" in longer:
        longer["mm_token_type_ids"] = (longer["input_ids"] == IMAGE).long()
    return longer


def counted_flops(model: PreTrainedModel, inputs: Inputs) -> int:
    """What the counter finds in the decoder's layers."""
    backbone = find_backbone(model)
    names = {module: name for name, module in model.named_modules()}
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**inputs, use_cache=False)
    counts = counter.get_flop_counts()
    total = 0
    for layer in backbone.layers:
        path = f"{type(model).__name__}.{names[layer]}"
        total += sum(counts[path].values())
    return total


def all_pairs_flops(shape: DecoderShape, tokens: Sequence[int]) -> float:
    assert shape.linear_flops is not None
    assert shape.pair_flops is not None
    costs = zip(tokens, shape.linear_flops, shape.pair_flops, strict=True)
    return sum(n * per_token + n * n * per_pair for n, per_token, per_pair in costs)


@pytest.mark.parametrize("is_pruned", [False, True], ids=["unpruned", "pruned"])
@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_flops_equal_those_that_torch_counts(name: str, is_pruned: bool) -> None:
    model = build(name)
    inputs, shape = prompt(name, model), find_backbone(model).shape
    length = inputs["input_ids"].shape[1]
    if not is_pruned:
        found, tokens = counted_flops(model, inputs), [length] * shape.num_layers
    else:
        vision = EVERY_FAMILY[name].vision(inputs) if name in FAMILIES_B else None
        # Positions only: no attention rows are computed for scores.
        ratio = 0.25
        if getattr(EVERY_FAMILY[name], "recurrent", False):
            seen = int(find_backbone(model).vision_mask(inputs["input_ids"]).sum())
            ratio = (seen - WHOLE_CHUNK) / seen
        schedule = schedule_for(model, (1, ratio), scorer="strided")
        with pruned(model, schedule, vision_mask=vision) as record:
            found = counted_flops(model, inputs)
        tokens = [row[0] for row in record.tokens_per_layer]
        assert tokens[-1] < length
    assert found == pytest.approx(all_pairs_flops(shape, tokens), rel=TOLERANCE)
