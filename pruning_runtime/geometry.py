"""Geometry of a decoder and the FLOPs of its layers, read from the modules and the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

_CHUNK = 64
"""Tokens per chunk of the gated delta rule, in transformers and in flash-linear-attention."""
_OUTPUT_PROJECTIONS = ("o_proj", "out_proj")
_TOP_K_FIELDS = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Geometry of the decoder: everything that costs depend on. Sizes are numbers of features.

    Attributes:
        num_layers, hidden_size, num_heads, num_kv_heads, intermediate_size, vocab_size: as in a configuration.
            Where layers differ, sizes are means over the layers. ``intermediate_size`` of a decoder whose
            configuration has none is the width of a gated MLP with the same FLOPs.
        head_dim: width of a head's queries and keys.
        value_dim: width of a head's values; None where it equals ``head_dim``.
        linear_flops: per layer, FLOPs per token that do not depend on the length of the prompt (linear maps, active
            experts, convolutions, recurrence). None: those of attention and a gated MLP of the sizes above.
        pair_flops: per layer, FLOPs per pair of a query and a key. None: those of the sizes above.
        scoring_flops: FLOPs per token of layer 0's query, key and value maps. None: those of the sizes above.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    value_dim: int | None = None
    linear_flops: tuple[int, ...] | None = None
    pair_flops: tuple[int, ...] | None = None
    scoring_flops: int | None = None

    def __post_init__(self) -> None:
        for name in ("linear_flops", "pair_flops"):  # JSON has lists only
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))
                if len(value) != self.num_layers:
                    raise ValueError(f"{name} has {len(value)} entries, num_layers is {self.num_layers}")

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that identify a decoder, without FLOPs and without those that are None."""
        named = {field.name: getattr(self, field.name) for field in fields(self)[:8]}
        return {name: size for name, size in named.items() if size is not None}


def read_shape(
    config: PreTrainedConfig, layers: nn.ModuleList, attends: Sequence[bool], sources: Sequence[int]
) -> DecoderShape:
    """The geometry of a decoder.

    Args:
        config: of the text model.
        layers: its decoder layers.
        attends: for each layer, whether it is an attention layer.
        sources: for each layer, the layer whose keys and values it uses.
    """
    configs = [config.per_layer_config[layer] for layer in range(len(layers))]
    heads = [each.num_attention_heads for each in configs]
    kv_heads = [
        getattr(each, "num_key_value_heads", None) or own for each, own in zip(configs, heads, strict=True)
    ]
    dims = [_head_dim(each) for each in configs]
    head_dim, value_dim = _mean(dims), getattr(config, "v_head_dim", None)
    linear = [
        _linear_flops(layer, each, shares_keys=source != index)
        for index, (layer, each, source) in enumerate(zip(layers, configs, sources, strict=True))
    ]
    pairs = [
        2 * count * (dim + (value_dim or dim)) if attention else 0
        for count, dim, attention in zip(heads, dims, attends, strict=True)
    ]
    inner = getattr(config, "intermediate_size", None)
    if inner is None:
        attention_flops = [
            _linear_flops(_mixer(layer), each) for layer, each in zip(layers, configs, strict=True)
        ]
        rest = sum(linear) - sum(attention_flops)
        inner = round(rest / len(layers) / (2 * 3 * config.hidden_size))
    return DecoderShape(
        num_layers=len(layers),
        hidden_size=config.hidden_size,
        num_heads=_mean(heads),
        num_kv_heads=_mean(kv_heads),
        head_dim=head_dim,
        intermediate_size=_mean(inner) if isinstance(inner, Sequence) else inner,
        vocab_size=config.vocab_size,
        value_dim=None if value_dim == head_dim else value_dim,
        linear_flops=tuple(linear),
        pair_flops=tuple(pairs),
        scoring_flops=_linear_flops(_mixer(layers[0]), configs[0], without=_OUTPUT_PROJECTIONS),
    )


def _mixer(layer: nn.Module) -> nn.Module:
    """The part of a decoder layer that mixes tokens: attention, a recurrence or a convolution."""
    named = (
        child
        for name, child in layer.named_children()
        if "attn" in name or "attention" in name or name in ("conv", "mixer")
    )
    return next(named, layer)


def _linear_flops(
    part: nn.Module, config: Any, *, shares_keys: bool = False, without: Sequence[str] = ()
) -> int:
    """FLOPs per token of all maps in ``part``; a multiply-add counts as two.

    Args:
        part: a decoder layer, or a part of one.
        config: of that layer.
        shares_keys: the layer owns key and value maps but does not run them (Gemma 3n).
        without: names of submodules to leave out.
    """
    from torch import nn  # here: costs of stored shapes need no torch

    if (features := getattr(part, "in_features", None)) is not None:
        return int(2 * features * part.out_features)
    without = (*without, "k_proj", "v_proj") if shares_keys else without
    own = [weight for weight in part.parameters(recurse=False) if weight.dim() > 1]
    total = sum(2 * weight.numel() for weight in own)
    if any(weight.dim() == 3 for weight in own) and not hasattr(part, "kernel_size"):
        total = total * _active_experts(part, config) // own[0].shape[0]
    children = {
        name: _linear_flops(child, config, without=without)
        for name, child in part.named_children()
        if name not in without
    }
    if {"text_moe", "vision_moe"} <= children.keys():
        # Each token runs one of the two (Ernie 4.5 VL); their mean stands for a prompt of both kinds.
        children["text_moe"] = (children["text_moe"] + children.pop("vision_moe")) // 2
    if isinstance(experts := getattr(part, "experts", None), nn.ModuleList) and len(experts):
        children["experts"] = children["experts"] * _active_experts(part, config) // len(experts)
    return total + sum(children.values()) + _products(part, config)


def _active_experts(experts: nn.Module, config: Any) -> int:
    """Experts that compute each token: those of the configuration, or all where it does not say."""
    stacked = [weight for weight in experts.parameters(recurse=False) if weight.dim() == 3]
    every = int(stacked[0].shape[0]) if stacked else len(experts.experts)  # type: ignore[arg-type]
    if stacked and len(signature(experts.forward).parameters) == 1:
        # Experts that are not given the router's choice (Llama 4) all compute every token.
        return every
    chosen = (getattr(config, name, None) for name in _TOP_K_FIELDS)
    return int(next((count for count in chosen if count is not None), every))


def _products(module: Any, config: Any) -> int:
    """FLOPs per token of products without weights of their own: the gated delta rule, and AltUp (Gemma 3n)."""
    if hasattr(module, "A_log") and hasattr(module, "head_v_dim"):
        keys, values = module.head_k_dim, module.head_v_dim
        # Per chunk of C tokens: q k^T, k k^T and their product with the values, each C x C; per token three
        # products with the state of keys x values numbers.
        per_head = 2 * _CHUNK * (2 * keys + values) + 3 * 2 * keys * values
        return int(module.num_v_heads * per_head)
    if hasattr(module, "prediction_coefs"):
        inputs, width = config.altup_num_inputs, config.hidden_size
        return int(2 * inputs**2 * width + 2 * inputs * width)  # predictions, and a second run of the router
    return 0


def _head_dim(layer: Any) -> int:
    if getattr(layer, "qk_nope_head_dim", None):
        # Latent attention (MLA): a configuration's `head_dim` is the rotated part of a key alone.
        return int(layer.qk_nope_head_dim + layer.qk_rope_head_dim)
    return int(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)


def _mean(sizes: Sequence[int]) -> int:
    return round(sum(sizes) / len(sizes))
