"""Rotary tables for positions counted anew: how each decoder makes one, and which cannot be asked to.

Layers do not all use one table (Gemma 3 and 4 have one by layer kind, Molmo2 by layer), and M-RoPE (Qwen-VL,
GLM-4V) reads several positions per token. Counted anew, what is left of an image is no grid any more, so
every token gets one number, the same in all sections: what M-RoPE itself gives to text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from pruning_runtime.sequence import once

TABLE = "position_embeddings"
"""What decoder layers call their rotary table."""


class Renumbering:
    """Gives decoder layers rotary tables of positions counted anew."""

    def __init__(self, text_model: nn.Module, layers: nn.ModuleList, kinds: Sequence[str]) -> None:
        # Looked up once: reading signatures at every layer of every token took a tenth of decoding on a small model.
        self._layers = [
            (*find_rotary(text_model, layer, kinds[layer]), table_place(block))
            for layer, block in enumerate(layers)
        ]

    def apply(
        self,
        made: dict[Any, Any],
        layer: int,
        hidden: Tensor,
        others: tuple[Any, ...],
        kwargs: dict[str, Any],
        places: Tensor,
    ) -> tuple[Any, ...]:
        """Give a layer the rotary table of ``places``; returns its positional arguments, changes the others.

        Args:
            made: shared by all layers with these places.
            layer: which decoder layer.
            hidden: its hidden states.
            others: its positional arguments behind the hidden states.
            kwargs: its keyword arguments, changed in place.
            places: positions counted anew, ``[batch, length]``.
        """
        name, make, at = self._layers[layer]
        table = once(made, ("rotary", name), lambda: make(hidden, places))
        position_ids = kwargs.get("position_ids")
        if position_ids is not None:
            kwargs["position_ids"] = places.expand(*position_ids.shape[:-2], -1, -1)
        if TABLE in kwargs or at is None or at > len(others):
            kwargs[TABLE] = table
            return others
        return (*others[: at - 1], table, *others[at:])  # the hidden states come first


def find_rotary(text_model: nn.Module, layer: int, kind: str) -> tuple[str, Callable[[Tensor, Tensor], Any]]:
    """How a decoder layer's rotary table is made: ``(name, make)``.

    ``make(hidden, places)`` gives the table for positions ``places`` (``[batch, length]``); layers with the
    same ``name`` share it.
    """
    model: Any = text_model
    if (groups := getattr(model, "rope_types", None)) is not None and groups[layer] == "unscaled":
        return "unscaled", lambda hidden, places: model.rotary_emb_unscaled(hidden, position_ids=places)
    if "layer_type" in signature(model.rotary_emb.forward).parameters:
        return kind, lambda hidden, places: model.rotary_emb(hidden, places, kind)
    if sections := _rope(model).get("mrope_section") or getattr(model.rotary_emb, "mrope_section", None):
        count = len(sections)
        return "", lambda hidden, places: model.rotary_emb(hidden, places.expand(count, -1, -1))
    return "", lambda hidden, places: model.rotary_emb(hidden, position_ids=places)


def table_place(layer: nn.Module) -> int | None:
    """Which positional argument of a decoder layer its rotary table is; None where it takes none."""
    names = list(signature(layer.forward).parameters)
    return names.index(TABLE) if TABLE in names else None


def why_not_renumbered(text_model: nn.Module, layers: nn.ModuleList, kinds: Sequence[str]) -> str | None:
    """Why a decoder cannot be given tables for positions counted anew; None where it can."""
    model: Any = text_model
    if not isinstance(rotary := getattr(model, "rotary_emb", None), nn.Module):
        return "its decoder has no `rotary_emb` that could make another table"
    without = [layer for layer, block in enumerate(layers) if table_place(block) is None]
    if without:
        return f"layers {without} take no {TABLE} and count positions themselves"
    if "dynamic" in rope_types(model):
        return "its 'dynamic' RoPE depends on the longest sequence so far, for all layers at once"
    tried: set[str] = set()
    for layer, kind in enumerate(kinds):
        name, make = find_rotary(model, layer, kind)
        if name not in tried and (problem := _problem_of(make, rotary)) is not None:
            return f"the rotary table of its layer {layer} ({kind}) cannot be made for other positions: {problem}"
        tried.add(name)
    return None


def rope_types(text_model: Any) -> set[str]:
    """What kinds of RoPE a decoder has; layers of different kinds may differ."""
    rope = _rope(text_model)
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    return {part["rope_type"] for part in parts if "rope_type" in part}


def _rope(text_model: Any) -> dict[str, Any]:
    return getattr(text_model.config, "rope_parameters", None) or {}


def _problem_of(make: Callable[[Tensor, Tensor], Any], rotary: nn.Module) -> str | None:
    """What is wrong with tables made for a few places: a call that fails, or places that make no difference."""
    device = next((buffer.device for buffer in rotary.buffers()), torch.device("cpu"))
    places = torch.tensor([[0, 1, 2], [0, 1, 3]], device=device)
    try:
        with torch.no_grad():
            table = make(torch.zeros(2, 3, 1, device=device), places)
    except (TypeError, ValueError, LookupError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    parts = table if isinstance(table, tuple) else (table,)
    if not all(isinstance(part, Tensor) and part.shape[:-1] == places.shape for part in parts):
        return "it has not one entry per token"
    if any(torch.equal(part[0, 2], part[1, 2]) for part in parts):
        return "it does not depend on the positions"
    return None
