"""What pruning with positions counted anew must equal: sequences from which dropped tokens are really gone.

Written without any part of the runtime. Each row runs alone, without padding and cache, through the model's
own layers one by one. What counting anew means is not written here either: the n-th token that is left
gets the rotary table that the model itself gives to the n-th token of a text. Which tokens may see each
other is read off the model's own masks of the unpruned sequence, so windows are as in the unpruned model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.support.own_mask_reference import DroppedFrom, find_layers
from tests.support.tiny_models import IMAGE, Inputs

Call = tuple[tuple[Any, ...], dict[str, Any]]


def renumbered_logits(
    model: PreTrainedModel,
    inputs: Inputs,
    generated: Tensor,
    dropped_from: DroppedFrom,
    *,
    extend: Callable[[Inputs, Tensor], Inputs],
) -> Tensor:
    """Logits of every generation step, ``[batch, steps, vocab]``; arguments as of `own_mask_logits`."""
    prompt, steps = inputs["input_ids"].shape[1], generated.shape[1]
    sequence = extend(inputs, generated[:, :-1])
    calls, features = _calls(model, sequence)
    text, _ = _calls(model, _text_like(sequence))
    layers = find_layers(model)
    rows = []
    for row, real in enumerate(sequence["attention_mask"].bool()):
        place = torch.arange(len(real))[real]
        state = _take(_hidden(calls[0]), row, place)
        for layer, block in enumerate(layers):
            gone = [positions[row] for first, positions in dropped_from if first == layer]
            if gone:
                stays = (place >= prompt) | ~gone[0][place.clamp(max=prompt - 1)]
                place, state = place[stays], state[..., stays, :]
            counted = layer >= min(first for first, _ in dropped_from)
            args, kwargs = _cut(calls[layer], text[layer] if counted else None, row, place)
            if not hasattr(block, "self_attn"):
                kwargs["attention_mask"] = None  # recurrent: it would say what is padding, and nothing is
            with torch.no_grad():
                state = block(state, *args, **kwargs)
            if layer < len(features):
                state = state + _take(features[layer], row, place)
        rows.append(_tail(model, layers[-1], state)[-steps:])
    return torch.stack(rows)


def merged_logits(
    model: PreTrainedModel,
    inputs: Inputs,
    generated: Tensor,
    stages: Sequence[Any],
    *,
    extend: Callable[[Inputs, Tensor], Inputs],
) -> Tensor:
    """Logits of every generation step if one kept token stands for all that are gone, ``[batch, steps, vocab]``.

    ``stages``: what a record says, with scores. Which tokens are kept is taken from it; which of them takes in the
    others, their mean, and how often attention counts it is worked out here, token by token. What is added to those
    tokens later (DeepStack) is added to the mean as its own mean.
    """
    prompt, steps = inputs["input_ids"].shape[1], generated.shape[1]
    sequence = extend(inputs, generated[:, :-1])
    calls, features = _calls(model, sequence)
    layers = find_layers(model)
    rows = []
    for row, real in enumerate(sequence["attention_mask"].bool()):
        place = torch.arange(len(real))[real].tolist()
        states = dict(zip(place, _take(_hidden(calls[0]), row, torch.tensor(place))[0], strict=True))
        added = [dict(zip(place, _take(part, row, torch.tensor(place))[0], strict=True)) for part in features]
        stand_for = dict.fromkeys(place, 1.0)
        seen, alive = list(range(prompt)), None
        for layer, block in enumerate(layers):
            for stage in stages:
                if stage.layer + 1 != layer:
                    continue
                kept = stage.kept_positions()[row]
                scores = dict(zip(seen, stage.scores[row].tolist(), strict=True))
                seen = stage._index[row].tolist()
                if alive is None:
                    alive = [p for p in place if p < prompt and int(sequence["input_ids"][row, p]) == IMAGE]
                gone, alive = [p for p in alive if p not in kept], kept
                if kept and gone:
                    standing = [p for p in kept if stand_for[p] > 1]
                    slot = standing[0] if standing else min(kept, key=scores.__getitem__)
                    members = [*gone, slot]
                    count = sum(stand_for[p] for p in members)
                    for vectors in (states, *added):
                        vectors[slot] = sum(stand_for[p] * vectors[p] for p in members) / count
                    stand_for[slot] = count
                place = [p for p in place if p not in gone]
            args, kwargs = _cut(calls[layer], None, row, torch.tensor(place))
            mask = kwargs["attention_mask"]
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            kwargs["attention_mask"] = mask + torch.tensor([stand_for[p] for p in place]).log()
            with torch.no_grad():
                state = block(torch.stack([states[p] for p in place])[None], *args, **kwargs)
            if layer < len(added):
                state = state + torch.stack([added[layer][p] for p in place])
            states = dict(zip(place, state[0], strict=True))
        rows.append(_tail(model, layers[-1], state)[-steps:])
    return torch.stack(rows)


def _calls(model: PreTrainedModel, sequence: Inputs) -> tuple[list[Call], list[Tensor]]:
    """What each layer is called with, and DeepStack's features, spread over the sequence."""
    calls: list[Call] = []
    features: list[Tensor] = []

    def before_layer(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    def before_decoder(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("deepstack_visual_embeds") is not None:
            for feature in kwargs["deepstack_visual_embeds"]:
                dense = torch.zeros_like(kwargs["inputs_embeds"])
                dense[kwargs["visual_pos_masks"]] = feature
                features.append(dense)

    hooks = [layer.register_forward_pre_hook(before_layer, with_kwargs=True) for layer in find_layers(model)]
    decoder = model.get_decoder()
    hooks.append(decoder.register_forward_pre_hook(before_decoder, with_kwargs=True))
    try:
        with torch.no_grad():
            model(**sequence, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, features


def _text_like(sequence: Inputs, length: int | None = None) -> Inputs:
    """One row of text, as long as the sequence, without padding."""
    ids = torch.full((1, length or sequence["input_ids"].shape[1]), 5)
    marks = {
        name: torch.zeros_like(ids) for name in ("mm_token_type_ids", "token_type_ids") if name in sequence
    }
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | marks


def _hidden(call: Call) -> Tensor:
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


def _take(states: Tensor, row: int, place: Tensor) -> Tensor:
    """One row's places, of ``[..., batch, length, width]``."""
    return states[..., row : row + 1, place, :]


def _cut(call: Call, text: Call | None, row: int, place: Tensor) -> Call:
    """A layer's arguments for a part of one row, with the table of a text of that length, if it is given."""
    text_args, text_kwargs = text or call
    first = torch.arange(len(place))

    def cut(value: Any, of_text: Any) -> Any:
        is_table = isinstance(value, tuple) or (isinstance(value, Tensor) and value.is_complex())
        if is_table and text is not None:
            return _each(of_text, lambda part: _take(part, 0, first))
        # A table may be shared by all rows.
        return _each(value, lambda part: _take(part, min(row, len(part) - 1), place))

    args = tuple(cut(value, other) for value, other in zip(call[0][1:], text_args[1:], strict=True))
    kwargs = {
        name: cut(value, text_kwargs[name])
        for name, value in call[1].items()
        if name not in ("hidden_states", "attention_mask", "position_ids")
    }
    kwargs["attention_mask"] = _mask(call[1].get("attention_mask"), row, place)
    return args, kwargs


def _each(value: Any, take: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, tuple):
        return tuple(map(take, value))
    return take(value) if isinstance(value, Tensor) else value


def _mask(mask: Tensor | None, row: int, place: Tensor) -> Tensor:
    if mask is None or mask.dim() == 2:
        return torch.ones(len(place), len(place), dtype=torch.bool).tril()[None, None]
    mask = mask[row : row + 1] if len(mask) > 1 else mask
    return mask[:, :, place][..., place]


def _tail(model: PreTrainedModel, last: nn.Module, state: Tensor) -> Tensor:
    """Logits of ``state``, by what the model does after its last layer."""
    text = _text_like({"input_ids": torch.zeros(1)}, state.shape[-2])
    hook = last.register_forward_hook(lambda *_: state)
    try:
        with torch.no_grad():
            return model(**text, use_cache=False).logits[0]
    finally:
        hook.remove()


def dropped_from_record(stages: Sequence[Any], inputs: Inputs, vision: Tensor) -> list[tuple[int, Tensor]]:
    """``dropped_from`` as a record tells it."""
    found = []
    for stage in stages:
        gone = vision & inputs["attention_mask"].bool()
        for row, positions in enumerate(stage.kept_positions()):
            gone[row, positions] = False
        found.append((stage.layer + 1, gone))
    return found
