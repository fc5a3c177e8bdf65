"""Every family of the three tables, with one way to build it, run it and compare it with its reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from pruning_runtime import Record
from tests.support import exactness, exactness_a, exactness_b
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import FAMILIES, Inputs

EVERY_FAMILY = (*FAMILIES, *FAMILIES_A, *FAMILIES_B)


@dataclass(frozen=True)
class TinyCase:
    """A tiny model of a family with a batch of prompts.

    ``vision_mask``: what `pruned` has to be given, for families whose ids do not tell.
    """

    name: str
    model: PreTrainedModel
    inputs: Inputs
    vision_mask: Tensor | None = None

    def reference(self, tokens: Tensor, record: Record) -> Tensor:
        """Logits of ``tokens`` after the prompts without any part of the runtime, ``[rows, tokens, vocabulary]``."""
        if self.name in FAMILIES_B:
            return exactness_b.reference(FAMILIES_B[self.name], self.model, self.inputs, tokens, record)
        if self.name in FAMILIES_A:
            gone = exactness_a.dropped(self.model, self.inputs, record)
            return exactness_a.reference(FAMILIES_A[self.name], self.model, self.inputs, tokens, gone)
        return exactness.reference(self.model, self.inputs, tokens, record)


def tiny_case(name: str, rows: tuple[int, ...] = (1,)) -> TinyCase:
    """The family's model and prompts with so many images each; skips where transformers lacks its class."""
    if name in FAMILIES_B:
        other = exactness_b.family_named(name)
        inputs = other.batch(rows)
        return TinyCase(name, other.build(), inputs, exactness_b.given_mask(other, inputs))
    family = exactness_a.family_named(name) if name in FAMILIES_A else FAMILIES[name]
    return TinyCase(name, family.build(), family.batch(rows))
