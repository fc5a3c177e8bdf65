"""Greedy generation with the logits that chose each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.tiny_models import IMAGE, VOCAB, Inputs

NOT_WORDS = list(range(IMAGE, VOCAB))
"""Never generated: a random model writes such tokens, which a reference would take for a part of an image."""


def generate(model: PreTrainedModel, inputs: Inputs, *, steps: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens ``[batch, steps]`` and their logits ``[batch, steps, vocab]``; ``options`` go to the model's own."""
    usual = {
        "max_new_tokens": steps,
        "min_new_tokens": steps,
        "do_sample": False,
        "suppress_tokens": NOT_WORDS,
    }
    with torch.no_grad():
        output = model.generate(**inputs, **usual | options, output_logits=True, return_dict_in_generate=True)
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, 1)
