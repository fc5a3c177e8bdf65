"""Models whose layers do not all use one rotary table (Gemma 3 and 4 by layer kind, Molmo2 by layer)."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import Tensor, nn


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
    return "", lambda hidden, places: model.rotary_emb(hidden, position_ids=places)
