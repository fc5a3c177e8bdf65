"""Layers that use another layer's keys and values (Gemma 3n, Gemma 4)."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig


def kv_sources(config: PreTrainedConfig, layer_kinds: Sequence[str]) -> tuple[int, ...]:
    """For each layer, the layer whose keys and values it uses.

    This is the layer itself, except for the last ``num_kv_shared_layers`` layers: they use the last layer of their kind
    that has its own.
    """
    num_layers = len(layer_kinds)
    first_shared = num_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    sources = []
    for layer, kind in enumerate(layer_kinds):
        own = layer < first_shared
        sources.append(layer if own else max(i for i in range(first_shared) if layer_kinds[i] == kind))
    return tuple(sources)
