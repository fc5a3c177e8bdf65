"""What pruning must equal, for families whose masks only they themselves can make.

As `tests.support.masked_reference`, but no mask is invented here: every decoder layer gets the one that the model
made for it (sliding, chunked, bidirectional over an image, prefix-LM), with dropped positions hidden as
keys. Without cache: each step runs the whole sequence again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.tiny_models import Inputs

DroppedFrom = Sequence[tuple[int, Tensor]]
"""``(layer, dropped)``: from ``layer`` on, positions in ``dropped`` (bool ``[batch, prompt]``) are no keys."""


def own_mask_logits(
    model: PreTrainedModel,
    inputs: Inputs,
    generated: Tensor,
    dropped_from: DroppedFrom,
    *,
    extend: Callable[[Inputs, Tensor], Inputs],
) -> Tensor:
    """Logits of every generation step, ``[batch, steps, vocab]``.

    Args:
        inputs: the prompt, left-padded.
        generated: tokens that follow it, ``[batch, steps]``; the last one is only predicted.
        dropped_from: what leaves, and where.
        extend: ``extend(inputs, tokens)`` is the prompt with ``tokens`` (``[batch, n]``, n may be 0)
            appended to everything that has an entry per token, position ids as `generate` counts them
            included.
    """
    steps = []
    hooks = [
        block.register_forward_pre_hook(_hide_keys(layer, dropped_from), with_kwargs=True)
        for layer, block in enumerate(find_layers(model))
    ]
    try:
        with torch.no_grad():
            for step in range(generated.shape[1]):
                sequence = extend(inputs, generated[:, :step])
                steps.append(model(**sequence, use_cache=False).logits[:, -1])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(steps, 1)


def append_tokens(inputs: Inputs, tokens: Tensor) -> Inputs:
    """``extend`` for most families: generated tokens are text, and positions are counted along the mask.

    Models with M-RoPE (``mm_token_type_ids`` and an image grid) count their own positions.
    """
    ones, zeros = torch.ones_like(tokens), torch.zeros_like(tokens)
    sequence = dict(inputs)
    for name, more in {
        "input_ids": tokens,
        "attention_mask": ones,
        "mm_token_type_ids": zeros,
        "moe_mm_token_type_ids": zeros,
        "token_type_ids": zeros,
    }.items():
        if name in inputs:
            sequence[name] = torch.cat([inputs[name], more], 1)
    if "mm_token_type_ids" not in inputs:
        sequence["position_ids"] = (sequence["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return sequence


def find_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder layers, found without the runtime."""
    candidate: Any = model.get_decoder()
    while not isinstance(getattr(candidate, "layers", None), torch.nn.ModuleList):
        candidate = getattr(candidate, "model", None) or candidate.language_model
    return candidate.layers


def _hide_keys(layer: int, dropped_from: DroppedFrom) -> Callable[..., Any]:
    """A pre-hook that hides in ``layer``'s own mask what has been dropped before it."""
    gone = [dropped for first, dropped in dropped_from if layer >= first]

    def hook(_module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not gone:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        batch, length = hidden.shape[-3], hidden.shape[-2]
        dropped = torch.zeros(batch, length, dtype=torch.bool)
        dropped[:, : gone[0].shape[1]] = torch.stack(gone).any(0)
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        # One mask per row and head group; a query that would see nothing (padding, or an image's first
        # token where no text precedes it) looks at itself, so that no NaN arises.
        if mask.dtype == torch.bool:
            mask = mask & ~dropped[:, None, None, :]
            blind = ~mask.any(-1, keepdim=True)
            mask = mask | (blind & torch.eye(mask.shape[-2], length, dtype=torch.bool))
        else:
            mask = mask.expand(batch, -1, -1, -1)
            mask = mask.masked_fill(dropped[:, None, None, :], torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    return hook


def compacted_logits(
    model: PreTrainedModel,
    inputs: Inputs,
    generated: Tensor,
    dropped_from: DroppedFrom,
    *,
    extend: Callable[[Inputs, Tensor], Inputs],
) -> Tensor:
    """As `own_mask_logits`, for decoders with recurrent layers: dropped tokens leave the sequence.

    A recurrent state has no keys to mask, so each row is run alone, without padding and cache: the model's
    own layers one by one, what is dropped taken out before its layer, rotary tables cut alike. Text
    layers are full attention or recurrent.
    """
    prompt, steps = inputs["input_ids"].shape[1], generated.shape[1]
    sequence = extend(inputs, generated[:, :-1])
    hidden, rotary = _decoder_inputs(model, sequence)
    rows = []
    for row, real in enumerate(sequence["attention_mask"].bool()):
        place = torch.arange(len(real))[real]
        state = hidden[row, real][None]
        tables = [table.expand(len(hidden), -1, -1)[row, real][None] for table in rotary]
        for layer, block in enumerate(find_layers(model)):
            gone = [positions[row] for first, positions in dropped_from if first == layer]
            if gone:
                stays = (place >= prompt) | ~gone[0][place.clamp(max=prompt - 1)]
                place, state = place[stays], state[:, stays]
                tables = [table[:, stays] for table in tables]
            length = len(place)
            # Additive, which every kernel understands. Recurrent layers take none: nothing is padding.
            causal = torch.full((1, 1, length, length), torch.finfo(state.dtype).min).triu(1)
            recurrent = not hasattr(block, "self_attn")
            with torch.no_grad():
                state = block(
                    state, position_embeddings=tuple(tables), attention_mask=None if recurrent else causal
                )
        with torch.no_grad():
            rows.append(model.lm_head(_final_norm(model)(state))[0, -steps:])
    return torch.stack(rows)


def _decoder_inputs(model: PreTrainedModel, sequence: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Embeddings (vision features in place) and rotary tables as the first decoder layer gets them."""
    seen: list[tuple[Tensor, tuple[Tensor, ...]]] = []
    hook = find_layers(model)[0].register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append((args[0], kwargs["position_embeddings"])), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**sequence, use_cache=False)
    finally:
        hook.remove()
    return seen[0]


def _final_norm(model: PreTrainedModel) -> torch.nn.Module:
    text: Any = model.get_decoder()
    return text.embedding_norm if hasattr(text, "embedding_norm") else text.norm
