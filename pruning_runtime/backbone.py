"""Find the parts of a stock vision-language model from the model itself.

There is no table of families: decoder layers, their kinds, the geometry and the vision token ids are read from the
modules and the configuration. A model that cannot be pruned correctly is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pruning_runtime.errors import UnsupportedBackbone
from pruning_runtime.geometry import DecoderShape as DecoderShape
from pruning_runtime.geometry import read_shape
from pruning_runtime.model_quirks.kv_sharing import kv_sources

ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
RECURRENT_KINDS = frozenset({"linear_attention", "conv"})
"""Layers with a state that runs along the sequence; for them, dropped tokens are removed from the sequence."""
KNOWN_LAYER_KINDS = ATTENTION_KINDS | RECURRENT_KINDS
_VISION_ID_FIELDS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")


@dataclass(frozen=True)
class Backbone:
    """A stock model and its parts; `find_backbone` makes one.

    Attributes:
        model: the whole model.
        text_model: the module that owns the decoder layers.
        layers: the decoder layers.
        layer_kinds: kind of each layer, one of `KNOWN_LAYER_KINDS`.
        kv_sources: for each layer, the layer whose keys and values it uses.
        vision_token_ids: ids of image and video tokens.
        shape: geometry of the decoder.
        model_type: of the configuration.
        name: of the checkpoint, or the class.
    """

    model: PreTrainedModel
    text_model: PreTrainedModel
    layers: nn.ModuleList
    layer_kinds: tuple[str, ...]
    kv_sources: tuple[int, ...]
    vision_token_ids: tuple[int, ...]
    shape: DecoderShape
    model_type: str
    name: str

    @property
    def config_digest(self) -> str:
        """Hash of the model type, the decoder's sizes and its layer kinds."""
        facts = {"model_type": self.model_type, **self.shape.sizes, "layer_kinds": self.layer_kinds}
        return "sha256:" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def attends(self, layer: int) -> bool:
        """Whether a decoder layer is an attention layer."""
        return self.layer_kinds[layer] in ATTENTION_KINDS

    def has_own_attention(self, layer: int) -> bool:
        """Whether a decoder layer is an attention layer with keys of its own, which scoring needs."""
        return self.attends(layer) and self.kv_sources[layer] == layer

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last decoder layer. Raises `UnsupportedBackbone`."""
        for name in ("norm", "embedding_norm"):  # LFM2 has the second
            if isinstance(norm := getattr(self.text_model, name, None), nn.Module):
                return norm
        raise UnsupportedBackbone(f"{type(self.text_model).__name__} has no final norm; use another scorer")

    def vision_mask(self, input_ids: Tensor) -> Tensor:
        """True where ``input_ids`` (``[batch, length]``) holds a vision token."""
        # One comparison per id: `torch.isin` with a tensor from the host would synchronize.
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for token_id in self.vision_token_ids:
            mask |= input_ids == token_id
        return mask


def find_backbone(model: PreTrainedModel) -> Backbone:
    """Find the decoder, its layers and the vision token ids of a stock model.

    Args:
        model: a vision-language model of transformers, on any device. It is not changed.

    Returns:
        The model with its parts.

    Raises:
        UnsupportedBackbone: a part is not found, or is of an unknown kind; the message names it.
    """
    family = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise UnsupportedBackbone(
            f"{family}: torch.compile(model) wraps the model, and hooks on it do not run; call model.compile(), which "
            "compiles it in place, and give the model itself"
        )
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise UnsupportedBackbone(
            f"{family} is no model of transformers; give the model inside it, as the `module` of a DataParallel"
        )
    text_config = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedBackbone(f"{family} is an encoder-decoder; its vision tokens are not in the decoder")
    num_layers = getattr(text_config, "num_hidden_layers", None)
    if num_layers is None:
        raise UnsupportedBackbone(f"{family}: its text configuration has no num_hidden_layers")
    text_model, layers = _find_text_model(model, num_layers)
    _refuse_cross_attention(layers, family)
    kinds = _layer_kinds(text_model.config, family)
    sources = kv_sources(text_model.config, kinds)
    attends = [kind in ATTENTION_KINDS for kind in kinds]
    return Backbone(
        model=model,
        text_model=text_model,
        layers=layers,
        layer_kinds=kinds,
        kv_sources=sources,
        vision_token_ids=_vision_token_ids(config, family),
        shape=read_shape(text_model.config, layers, attends, sources),
        model_type=config.model_type,
        name=str(getattr(config, "_name_or_path", "") or family),
    )


def _find_text_model(model: PreTrainedModel, num_layers: int) -> tuple[PreTrainedModel, nn.ModuleList]:
    candidate: Any = model.get_decoder()
    while candidate is not None:
        layers = getattr(candidate, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) == num_layers:
            return candidate, layers
        candidate = getattr(candidate, "model", None) or getattr(candidate, "language_model", None)
    raise UnsupportedBackbone(
        f"{type(model).__name__}: no module below get_decoder() owns `layers` with {num_layers} decoder layers"
    )


def _refuse_cross_attention(layers: nn.ModuleList, family: str) -> None:
    if any("cross_attn" in name for name, _ in layers.named_modules()):
        raise UnsupportedBackbone(
            f"{family} attends to its image in cross-attention layers; its vision tokens are not in the "
            "decoder's sequence and cannot be dropped from it"
        )


def _layer_kinds(text_config: PreTrainedConfig, family: str) -> tuple[str, ...]:
    kinds = getattr(text_config, "layer_types", None) or _kinds_by_span(text_config)
    if unknown := sorted(set(kinds) - KNOWN_LAYER_KINDS):
        raise UnsupportedBackbone(
            f"{family} has decoder layers of kind {', '.join(unknown)}; "
            f"only {', '.join(sorted(KNOWN_LAYER_KINDS))} can be pruned"
        )
    return tuple(kinds)


def _kinds_by_span(text_config: PreTrainedConfig) -> list[str]:
    """Kinds of layers without `layer_types`: by the window in the configuration, as the cache decides."""
    kind = "full_attention"
    if getattr(text_config, "sliding_window", None) is not None:
        kind = "sliding_attention"
    elif getattr(text_config, "attention_chunk_size", None) is not None:
        kind = "chunked_attention"
    return [kind] * text_config.num_hidden_layers


def _vision_token_ids(config: PreTrainedConfig, family: str) -> tuple[int, ...]:
    # Phi-4-multimodal, which has no text configuration, states them in that of its vision tower.
    found: set[int] = set()
    for part in (config, getattr(config, "vision_config", None)):
        ids = (getattr(part, field, None) for field in _VISION_ID_FIELDS)
        if found := {token_id for token_id in ids if token_id is not None}:
            break
    if not found:
        raise UnsupportedBackbone(
            f"{family}: its configuration names no vision token id ({', '.join(_VISION_ID_FIELDS)}); "
            "its vision tokens must be in the decoder's sequence"
        )
    return tuple(sorted(found))
