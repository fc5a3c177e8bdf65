"""What pruning must equal: the unpruned sequence with the dropped tokens masked as keys.

Written without any part of the runtime: no cache, no gathering. Every step runs the whole sequence
again and each layer gets a mask made here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.tiny_models import Inputs


def masked_logits(
    model: PreTrainedModel,
    inputs: Inputs,
    generated: Tensor,
    dropped_from: Sequence[tuple[int, Tensor]],
    *,
    window: Sequence[int | None] | None = None,
) -> Tensor:
    """Logits of every generation step, ``[batch, steps, vocab]``.

    Args:
        inputs: the prompt, left-padded.
        generated: tokens that follow it, ``[batch, steps]``; the last one is only predicted.
        dropped_from: ``(layer, dropped)``: from ``layer`` on, positions in ``dropped`` (bool
            ``[batch, prompt length]``) are no keys any more.
        window: sliding window of each layer, None for full attention.
    """
    batch, prompt = inputs["input_ids"].shape
    steps = generated.shape[1]
    more = generated[:, :-1]
    ids = torch.cat([inputs["input_ids"], more], 1)
    valid = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    sequence = dict(inputs, input_ids=ids, attention_mask=valid)
    if "mm_token_type_ids" in inputs:
        sequence["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more)], 1)
    else:
        sequence["position_ids"] = (valid.cumsum(1) - 1).clamp(min=0)
    layers = model.get_decoder().layers
    length = ids.shape[1]
    position = torch.arange(length, device=ids.device)
    causal = position <= position[:, None]

    def mask_for(layer: int) -> Tensor:
        allowed = causal[None] & valid.bool()[:, None, :]
        for first, dropped in dropped_from:
            if layer >= first:
                gone = torch.zeros(batch, length, dtype=torch.bool, device=ids.device)
                gone[:, :prompt] = dropped
                allowed = allowed & ~gone[:, None, :]
        if window is not None and window[layer] is not None:
            allowed = allowed & (position[:, None] - position < window[layer])
        # A query that sees nothing (padding) looks at itself, so that no NaN arises.
        allowed = allowed | torch.eye(length, dtype=torch.bool, device=ids.device)
        bias = torch.zeros(batch, 1, length, length, dtype=model.dtype, device=ids.device)
        return bias.masked_fill(~allowed[:, None], torch.finfo(model.dtype).min)

    hooks = [
        block.register_forward_pre_hook(
            lambda _module, args, kwargs, layer=layer: (args, {**kwargs, "attention_mask": mask_for(layer)}),
            with_kwargs=True,
        )
        for layer, block in enumerate(layers)
    ]
    try:
        with torch.no_grad():
            logits = model(**sequence, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits[:, prompt - 1 : prompt - 1 + steps]


def dropped_positions(inputs: Inputs, vision: Tensor, kept: list[list[int]]) -> Tensor:
    """Vision positions that are not in ``kept``, bool ``[batch, prompt length]``."""
    dropped = vision & inputs["attention_mask"].bool()
    for row, positions in enumerate(kept):
        dropped[row, positions] = False
    return dropped
