"""Pruned generations of `FAMILIES_A`, compared with masking, or with compaction where a layer is recurrent."""

from __future__ import annotations

import functools

import pytest
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from pruning_runtime import Record, Schedule, find_backbone, pruned
from tests.support import greedy
from tests.support.masked_reference import dropped_positions
from tests.support.own_mask_reference import DroppedFrom, append_tokens, compacted_logits, own_mask_logits
from tests.support.rounding import rounding_bound
from tests.support.tiny_families_a import FAMILIES_A, TinyFamilyA
from tests.support.tiny_models import Inputs

STEPS = 5
generate = functools.partial(greedy.generate, steps=STEPS)


def family_named(name: str) -> TinyFamilyA:
    """The family; skips where this release of transformers lacks its class."""
    family = FAMILIES_A[name]
    if not family.available:
        pytest.skip(f"transformers {transformers.__version__} has no {family.class_name}")
    return family


def dropped(model: PreTrainedModel, inputs: Inputs, record: Record) -> DroppedFrom:
    """What the record says left, and before which layer."""
    vision = find_backbone(model).vision_mask(inputs["input_ids"])
    return [
        (stage.layer + 1, dropped_positions(inputs, vision, stage.kept_positions()))
        for stage in record.stages
    ]


def reference(
    family: TinyFamilyA, model: PreTrainedModel, inputs: Inputs, tokens: Tensor, gone: DroppedFrom
) -> Tensor:
    """Logits without any part of the runtime."""
    logits = compacted_logits if family.recurrent else own_mask_logits
    return logits(model, inputs, tokens, gone, extend=append_tokens)


def check(family: TinyFamilyA, model: PreTrainedModel, inputs: Inputs, schedule: Schedule) -> Record:
    """Compare a pruned generation with the reference, and the reference with an unpruned one."""
    with pruned(model, schedule) as record:
        tokens, logits = generate(model, inputs)
    assert [stage.layer for stage in record.stages] == [stage.layer for stage in schedule.stages]
    expected = reference(family, model, inputs, tokens, dropped(model, inputs, record))
    assert (logits - expected).abs().max() < rounding_bound(model, inputs)
    # Had nothing been dropped, the logits would be others: the comparison above can fail.
    unpruned = reference(family, model, inputs, tokens, [])
    pruned_rows = [row for row, count in enumerate(record.num_vision) if count]
    assert (logits - unpruned)[pruned_rows].abs().amax((1, 2)).min() > 0.05
    return record
