"""The unpruned model's own answers, and prompts with such an answer behind them (teacher forcing)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pruning_runtime.backbone import Backbone
from schedule_finder.models.generation import GREEDY

_SUFFIX_TYPES = {"paligemma": 1}
"""``token_type_ids`` of an answer by model type, 0 for others: PaliGemma attends both ways within 0."""


def greedy_answers(backbone: Backbone, inputs: dict[str, Tensor], most: int) -> list[list[int]]:
    """The model's greedy answer to each prompt of a batch.

    Args:
        backbone: the unpruned model.
        inputs: left-padded prompts on the model's device.
        most: longest answer, in tokens.

    Returns:
        Token ids of each row, 1 to ``most``. The token that ends an answer is part of it. An answer also ends with
        an id of a vision token, which a model may write and which no prompt may hold without an image, and with one
        whose embedding a model replaces in prompts with an image (Ovis2).
    """
    return _until_end(backbone, _generate(backbone, inputs, most)[:, inputs["input_ids"].shape[1] :])


def answers_with_logits(
    backbone: Backbone, inputs: dict[str, Tensor], most: int
) -> tuple[list[list[int]], Tensor]:
    """`greedy_answers`, and the model's logits where it chose their tokens.

    Returns:
        Token ids of each row, and logits, float32 ``[rows, longest answer, vocabulary]``, before any penalty of the
        checkpoint's ``generation_config``. Behind the end of a shorter answer they have no meaning.
    """
    output = _generate(backbone, inputs, most, output_logits=True, return_dict_in_generate=True)
    answers = _until_end(backbone, output.sequences[:, inputs["input_ids"].shape[1] :])
    return answers, torch.stack(output.logits[: max(map(len, answers))], 1)


def _generate(backbone: Backbone, inputs: dict[str, Tensor], most: int, **options: Any) -> Any:
    model: Any = backbone.model
    with torch.inference_mode():
        return model.generate(**inputs, max_new_tokens=most, **GREEDY, **options)


def _until_end(backbone: Backbone, generated: Tensor) -> list[list[int]]:
    """Generated ids (``[rows, steps]``) up to and with the first that ends an answer; what follows it is padding."""
    model: Any = backbone.model
    ends = backbone.vision_mask(generated)
    replaced = getattr(model.config, "visual_indicator_token_ids", None)
    for stops in (model.generation_config.eos_token_id, replaced):
        if stops is not None:
            ends |= torch.isin(generated, torch.as_tensor(stops, device=generated.device))
    lengths = (ends.cumsum(1) - ends.long() == 0).sum(1).tolist()
    return [row[:length] for row, length in zip(generated.tolist(), lengths, strict=True)]


def with_answers(
    backbone: Backbone, inputs: dict[str, Tensor], answers: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """The inputs of one pass over prompts and their answers.

    All tokens of an answer but the last follow its prompt: the logits of the last prompt position and of these
    positions predict the answer. Shorter answers are filled with the prompt's last text token, which cannot change
    the logits before it.

    Args:
        backbone: knows the ids of vision tokens.
        inputs: left-padded prompts.
        answers: token ids of each row, at least 1.

    Returns:
        The inputs, all tensors with an entry per position longer by the longest answer less 1.
    """
    ids = inputs["input_ids"]
    given = max(map(len, answers)) - 1
    if given == 0:
        return inputs
    text = ~backbone.vision_mask(ids)
    last_text = (text * torch.arange(ids.shape[1], device=ids.device)).argmax(1, keepdim=True)
    filled = ids.gather(1, last_text).repeat(1, given)
    for row, answer in enumerate(answers):
        filled[row, : len(answer) - 1] = torch.tensor(answer[:-1], dtype=ids.dtype, device=ids.device)
    added = {
        "input_ids": filled,
        "attention_mask": torch.ones_like(filled),
        "token_type_ids": torch.full_like(filled, _SUFFIX_TYPES.get(backbone.model_type, 0)),
    }
    none = torch.zeros_like(filled)  # of no modality
    return {
        name: torch.cat([value, added.get(name, none).to(value.dtype)], 1)
        if value.shape == ids.shape
        else value
        for name, value in inputs.items()
    }
