"""How each layer divides its attention: text before the vision tokens, vision tokens, question, answer so far.

The figure that FastV (arXiv 2403.06764) begins with, for any backbone. The full model is measured on its own answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pruning_runtime import UnsupportedBackbone
from pruning_runtime.attention_rows import attention_rows, find_text_queries, padded_indices
from pruning_runtime.attention_tap import AttentionInputs, attention_tap
from pruning_runtime.backbone import Backbone
from schedule_finder.evaluation.allocation_table import COLUMNS, QUERIES
from schedule_finder.files import write_text
from schedule_finder.measuring.own_answers import greedy_answers, with_answers
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.profiling.capture import layers_to_profile
from schedule_finder.samples import Sample


def write_allocation(
    path: Path, loaded: LoadedBackbone, samples: Sequence[Sample], max_new_tokens: int
) -> None:
    """Write ``5_allocation.csv``, a row per sample, layer and kind of query; nothing where it cannot be measured.

    That is where a layer computes a part of the positions only. A file that is there is kept: it does not depend on a
    schedule.
    """
    if path.exists():
        return
    backbone = loaded.backbone
    inputs = {name: value.to(loaded.device) for name, value in loaded.inputs(list(samples)).items()}
    answers = greedy_answers(backbone, inputs, max_new_tokens)
    try:
        layers, _ = layers_to_profile(backbone)
        shares, counts = attention_allocation(backbone, inputs, answers)
    except UnsupportedBackbone:
        return
    rows = [
        (sample.id, layer, queries, *shares[number, place, which], *counts[number])
        for number, sample in enumerate(samples)
        for place, layer in enumerate(layers)
        for which, queries in enumerate(QUERIES)
    ]
    write_text(path, pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False, float_format="%.5g"))


def attention_allocation(
    backbone: Backbone, inputs: dict[str, Tensor], answers: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of attention on each of `KEYS`, mean over heads and queries, in one pass over prompts with their answers.

    Args:
        backbone: the unpruned model.
        inputs: left-padded prompts on the model's device.
        answers: token ids of each row's answer, at least 1.

    Returns:
        Shares ``[samples, layers, QUERIES, KEYS]``, each row of keys sums to 1, and the number of tokens of each of
        `KEYS` ``[samples, KEYS]``. Layers are those of `layers_to_profile`.

    Raises:
        UnsupportedBackbone: no layer has attention of its own, or one computes a part of the positions only.
    """
    layers, _ = layers_to_profile(backbone)
    whole = with_answers(backbone, inputs, answers)
    keys, queries = _kinds(backbone, inputs, whole, answers)
    rows, real = padded_indices(queries.any(1), int(queries.any(1).sum(1).max()))
    asked = queries.gather(2, rows[:, None].expand(-1, len(QUERIES), -1)).float()
    found: dict[int, np.ndarray] = {}

    def on_attention(call: AttentionInputs) -> None:
        if call.layer not in layers:
            return
        if call.query.shape[2] != keys.shape[2]:
            raise UnsupportedBackbone(
                f"decoder layer {call.layer} does not compute all positions of a prompt"
            )
        device = call.query.device
        here = [tensor.to(device) for tensor in (rows, real, keys, asked)]
        blocks = attention_rows(
            call.query, call.key, here[0], here[1], call.mask, call.scaling,
            softcap=call.softcap, sliding_window=call.sliding_window,
        )  # fmt: skip
        per_query = sum((block @ here[2].transpose(1, 2)[:, None]).sum(1) for block in blocks)
        shares = (here[3] @ per_query) / here[3].sum(2, keepdim=True) / call.query.shape[1]
        found[call.layer] = shares.cpu().numpy()

    model: Any = backbone.model
    with torch.inference_mode(), attention_tap(backbone, on_attention):
        model(**whole, use_cache=False, logits_to_keep=1)
    if missing := [layer for layer in layers if layer not in found]:
        raise UnsupportedBackbone(
            f"decoder layers {missing} do not use the attention interface of transformers"
        )
    shares = np.stack([found[layer] for layer in layers], 1)
    # What a layer gives to a sink without a token, as some decoders have, is left out.
    return shares / shares.sum(3, keepdims=True), keys.sum(2).long().cpu().numpy()


def _kinds(
    backbone: Backbone,
    inputs: dict[str, Tensor],
    whole: dict[str, Tensor],
    answers: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    """Which positions are of each of `KEYS`, float32 ``[samples, 4, length]``, and of `QUERIES`, bool ``[.., 2, ..]``."""
    ids = inputs["input_ids"]
    prompt, length = ids.shape[1], whole["input_ids"].shape[1]
    valid = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(ids).bool()
    vision = backbone.vision_mask(ids) & valid
    question = find_text_queries(vision, valid)
    position = torch.arange(length, device=ids.device)
    ends = torch.tensor([prompt + len(answer) - 1 for answer in answers], device=ids.device)
    answer = (position >= prompt) & (position < ends[:, None])

    def longer(mask: Tensor) -> Tensor:
        return torch.nn.functional.pad(mask, (0, length - prompt))

    vision, question = longer(vision), longer(question)
    system = longer(valid) & ~vision & ~question
    generates = answer | (position == prompt - 1)
    keys = torch.stack([system, vision, question, answer], 1).float()
    return keys, torch.stack([question, generates], 1)
