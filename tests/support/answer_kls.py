"""Answer KL of tiny models on batches of their own."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from pruning_runtime import find_backbone
from pruning_runtime.schedule import BackboneIdentity
from schedule_finder.measuring.answer_kl import AnswerKL, TokenPolicy
from schedule_finder.measuring.unit_store import UnitStore
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import FAMILIES, Inputs

POLICY = TokenPolicy("text_guided")


def answer_kl_of(
    model: PreTrainedModel,
    batches: list[Inputs],
    store: UnitStore | None = None,
    answer_tokens: int = 4,
    order: list[int] | None = None,
) -> AnswerKL:
    """The measurement of a model on batches, whose rows are its samples."""
    backbone = find_backbone(model)
    identity = BackboneIdentity(
        name="tiny", model_type=backbone.model_type, num_layers=backbone.shape.num_layers
    )
    names = [
        f"{batch}-{row}" for batch, inputs in enumerate(batches) for row in range(len(inputs["input_ids"]))
    ]
    return AnswerKL(backbone, identity, names, batches, store, answer_tokens, order)


def a_model_of(name: str) -> tuple[PreTrainedModel, Inputs]:
    """A family's model and a batch; skips where this release of transformers lacks the family."""
    if name in FAMILIES:
        return FAMILIES[name].build(), FAMILIES[name].batch((2, 1))
    if name in FAMILIES_A:
        if not FAMILIES_A[name].available:
            pytest.skip(f"this release of transformers has no {FAMILIES_A[name].class_name}")
        return FAMILIES_A[name].build(), FAMILIES_A[name].batch((2, 1))
    if FAMILIES_B[name].missing:
        pytest.skip(FAMILIES_B[name].missing)
    return FAMILIES_B[name].build(), FAMILIES_B[name].batch((2, 1))


def answer_kl_length(answer_kl: AnswerKL) -> int:
    """Positions behind the prompts of the first batch."""
    return answer_kl._batches[0].answer_length
