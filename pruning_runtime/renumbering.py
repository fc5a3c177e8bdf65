"""Rotary tables for renumbered positions.

Layers may use different tables (Gemma 3 and 4: one per layer kind; Molmo2: per layer). M-RoPE (Qwen-VL, GLM-4V) reads
several positions per token. The kept tokens of an image form no grid, so a renumbered token gets one position in all
sections, as M-RoPE gives to text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from pruning_runtime.sequence import once

TABLE = "position_embeddings"
"""Name of the rotary table among the arguments of a decoder layer."""


class Renumbering:
    """Gives decoder layers rotary tables of renumbered positions."""

    def __init__(self, text_model: nn.Module, layers: nn.ModuleList, kinds: Sequence[str]) -> None:
        # Signatures are read once: reading them at every layer took a tenth of the decoding time of a small model.
        self._layers = [
            (*find_rotary(text_model, layer, kinds[layer]), table_index(block))
            for layer, block in enumerate(layers)
        ]

    def apply(
        self,
        made: dict[Any, Any],
        layer: int,
        hidden: Tensor,
        others: tuple[Any, ...],
        kwargs: dict[str, Any],
        positions: Tensor,
    ) -> tuple[Any, ...]:
        """Replace a layer's rotary table by that of ``positions``.

        Args:
            made: tables so far, shared by all layers with these positions.
            layer: decoder layer.
            hidden: its hidden states.
            others: its positional arguments after the hidden states.
            kwargs: its keyword arguments, changed in place.
            positions: renumbered, ``[batch, length]``.

        Returns:
            The new positional arguments.
        """
        name, make, at = self._layers[layer]
        table = once(made, ("rotary", name), lambda: make(hidden, positions))
        position_ids = kwargs.get("position_ids")
        if position_ids is not None:
            kwargs["position_ids"] = positions.expand(*position_ids.shape[:-2], -1, -1)
        if TABLE in kwargs or at is None or at > len(others):
            kwargs[TABLE] = table
            return others
        return (*others[: at - 1], table, *others[at:])  # the hidden states come first


def find_rotary(text_model: nn.Module, layer: int, kind: str) -> tuple[str, Callable[[Tensor, Tensor], Any]]:
    """How to make a decoder layer's rotary table: ``(name, make)``.

    ``make(hidden, positions)`` returns the table of ``positions`` (``[batch, length]``). Layers with the same
    ``name`` share it.
    """
    model: Any = text_model
    if (groups := getattr(model, "rope_types", None)) is not None and groups[layer] == "unscaled":
        return "unscaled", lambda hidden, positions: model.rotary_emb_unscaled(hidden, position_ids=positions)
    if "layer_type" in signature(model.rotary_emb.forward).parameters:
        return kind, lambda hidden, positions: model.rotary_emb(hidden, positions, kind)
    if sections := _rope(model).get("mrope_section") or getattr(model.rotary_emb, "mrope_section", None):
        count = len(sections)
        return "", lambda hidden, positions: model.rotary_emb(hidden, positions.expand(count, -1, -1))
    return "", lambda hidden, positions: model.rotary_emb(hidden, position_ids=positions)


def table_index(layer: nn.Module) -> int | None:
    """Index of the rotary table among the positional arguments of a decoder layer; None if it takes none."""
    names = list(signature(layer.forward).parameters)
    return names.index(TABLE) if TABLE in names else None


def rope_types(text_model: Any) -> set[str]:
    """Types of RoPE of a decoder; layers of different kinds may differ."""
    rope = _rope(text_model)
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    return {part["rope_type"] for part in parts if "rope_type" in part}


def _rope(text_model: Any) -> dict[str, Any]:
    return getattr(text_model.config, "rope_parameters", None) or {}


def problem_of_table(make: Callable[[Tensor, Tensor], Any], rotary: nn.Module) -> str | None:
    """Make tables for a few positions and return what is wrong with them; None if nothing is."""
    device = next((buffer.device for buffer in rotary.buffers()), torch.device("cpu"))
    positions = torch.tensor([[0, 1, 2], [0, 1, 3]], device=device)
    try:
        with torch.no_grad():
            table = make(torch.zeros(2, 3, 1, device=device), positions)
    except (TypeError, ValueError, LookupError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    parts = table if isinstance(table, tuple) else (table,)
    if not all(isinstance(part, Tensor) and part.shape[:-1] == positions.shape for part in parts):
        return "it does not have one entry per token"
    if any(torch.equal(part[0, 2], part[1, 2]) for part in parts):
        return "it does not depend on the positions"
    return None
