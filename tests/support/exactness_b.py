"""Pruned generations of `FAMILIES_B`, and the masked runs that they must equal."""

from __future__ import annotations

import functools

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from pruning_runtime import Record
from tests.support import greedy
from tests.support.masked_reference import dropped_positions
from tests.support.own_mask_reference import own_mask_logits
from tests.support.tiny_families_b import FAMILIES_B, FamilyB
from tests.support.tiny_models import Inputs

STEPS = 5
generate = functools.partial(greedy.generate, steps=STEPS)


def family_named(name: str) -> FamilyB:
    """The family, or a skip that names the release that lacks it."""
    family = FAMILIES_B[name]
    if family.missing:
        pytest.skip(family.missing)
    return family


def reference(
    family: FamilyB, model: PreTrainedModel, inputs: Inputs, tokens: Tensor, record: Record | None
) -> Tensor:
    """The run under the model's own masks with dropped tokens hidden; which ones is read off the record."""
    vision = family.vision(inputs)
    dropped = [
        (stage.layer + 1, dropped_positions(inputs, vision, stage.kept_positions()))
        for stage in (record.stages if record else [])
    ]
    return own_mask_logits(model, inputs, tokens, dropped, extend=family.extend)


def given_mask(family: FamilyB, inputs: Inputs) -> Tensor | None:
    """The vision mask that `pruned` has to be given, if the family's ids do not tell."""
    return family.vision(inputs) if family.needs_mask else None
