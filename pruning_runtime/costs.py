"""What a schedule costs: tokens per layer by both counts, FLOPs and cache bytes.

Published token counts (*published*) credit a pruning layer with its size after pruning, although its
attention and MLP still run at full width. The *processed* count is what the layers really compute.
"""

from __future__ import annotations

from collections.abc import Sequence

from pruning_runtime.geometry import DecoderShape
from pruning_runtime.schedule import Budget, BudgetKind, Stage
from pruning_runtime.scorers import make_scorer


def processed_ratios(stages: Sequence[Stage], num_layers: int) -> list[float]:
    """Fraction of the vision tokens that each layer really computes, ``num_layers`` numbers."""
    return _ratios(stages, [layer - 1 for layer in range(num_layers)])


def published_ratios(stages: Sequence[Stage], num_layers: int) -> list[float]:
    """As `processed_ratios`, but a stage counts from its own layer on, as in the papers."""
    return _ratios(stages, list(range(num_layers)))


def _ratios(stages: Sequence[Stage], last_stage_that_counts: Sequence[int]) -> list[float]:
    ratios = []
    for last in last_stage_that_counts:
        done = [stage.keep_ratio for stage in stages if stage.layer <= last]
        ratios.append(done[-1] if done else 1.0)
    return ratios


def scores_before_decoder(stages: Sequence[Stage], scorer: str) -> bool:
    """Whether tokens are scored before the decoder, by layer 0's queries and keys of all of them."""
    first = stages[0] if stages else None
    needs = make_scorer(scorer).needs_attention
    return first is not None and first.layer == -1 and first.keep_ratio < 1 and needs


def pre_decoder_share(shape: DecoderShape) -> float:
    """Cost of scoring before the decoder: layer 0's query, key and value maps over the linear maps of a mean layer."""
    linear = _linear_flops(shape)
    return _scoring_flops(shape) / (sum(linear) / len(linear))


def prefill_flops(
    shape: DecoderShape, tokens_per_layer: Sequence[float], *, pre_decoder_tokens: float = 0
) -> float:
    """FLOPs of the decoder's layers over one prompt; a multiply-add counts as two.

    Counts what `DecoderShape.linear_flops` lists and the causal half of the two attention products, in sliding layers
    too. Norms, RoPE, scoring rows and the LM head are not counted.

    Args:
        shape: the decoder.
        tokens_per_layer: all tokens (vision, text, prefix) that each layer computes. A list of another length than
            the decoder's stands for as many mean layers.
        pre_decoder_tokens: tokens whose queries and keys layer 0 computes once more to score them.
    """
    linear, pairs = _linear_flops(shape), _pair_flops(shape)
    if len(tokens_per_layer) != shape.num_layers:
        count = len(tokens_per_layer)
        linear, pairs = [sum(linear) / len(linear)] * count, [sum(pairs) / len(pairs)] * count
    layers = sum(
        n * per_token + per_pair * n * (n + 1) / 2
        for n, per_token, per_pair in zip(tokens_per_layer, linear, pairs, strict=True)
    )
    return layers + pre_decoder_tokens * _scoring_flops(shape)


def _linear_flops(shape: DecoderShape) -> Sequence[float]:
    """Per layer, FLOPs per token; without measured ones those of attention and a gated MLP."""
    if shape.linear_flops is not None:
        return shape.linear_flops
    attention = (shape.num_heads + shape.num_kv_heads) * _head_width(shape)
    return [2 * shape.hidden_size * (attention + 3 * shape.intermediate_size)] * shape.num_layers


def _pair_flops(shape: DecoderShape) -> Sequence[float]:
    """Per layer, FLOPs per pair of a query and a key."""
    if shape.pair_flops is not None:
        return shape.pair_flops
    return [2 * shape.num_heads * _head_width(shape)] * shape.num_layers


def _scoring_flops(shape: DecoderShape) -> float:
    """FLOPs per token of layer 0's query, key and value maps."""
    if shape.scoring_flops is not None:
        return shape.scoring_flops
    return 2 * shape.hidden_size * (
        shape.num_heads * shape.head_dim + shape.num_kv_heads * _head_width(shape)
    )


def _head_width(shape: DecoderShape) -> int:
    """Features of a head's key and value together."""
    return shape.head_dim + (shape.value_dim or shape.head_dim)


def flops_ratio(
    stages: Sequence[Stage],
    shape: DecoderShape,
    num_vision: float,
    num_other: float,
    *,
    pre_decoder: bool = False,
) -> float:
    """Prefill FLOPs of the pruned decoder over those of the full one, for a typical prompt.

    Args:
        stages: of the schedule.
        shape: the decoder.
        num_vision: vision tokens of the prompt.
        num_other: all its other tokens.
        pre_decoder: whether `scores_before_decoder`.
    """
    kept = processed_ratios(stages, shape.num_layers)
    whole = num_vision + num_other
    tokens = [ratio * num_vision + num_other for ratio in kept]
    pruned = prefill_flops(shape, tokens, pre_decoder_tokens=whole if pre_decoder else 0)
    return pruned / prefill_flops(shape, [whole] * shape.num_layers)


def kv_cache_bytes(shape: DecoderShape, tokens_per_layer: Sequence[float], bytes_per_value: int = 2) -> float:
    """Bytes of keys and values that the layers hold after the prefill.

    An estimate: a cache that keeps latents (MLA) or a window only holds less. `Record.cache_bytes` is
    measured.
    """
    per_token = shape.num_kv_heads * (shape.head_dim + (shape.value_dim or shape.head_dim))
    return sum(tokens_per_layer) * per_token * bytes_per_value


def kv_ratio(stages: Sequence[Stage], num_layers: int, num_vision: float, num_other: float) -> float:
    """Cache entries of the pruned decoder over those of the full one, for a typical prompt."""
    processed = sum(processed_ratios(stages, num_layers)) / num_layers
    return (processed * num_vision + num_other) / (num_vision + num_other)


def budget_of(
    stages: Sequence[Stage],
    shape: DecoderShape,
    num_vision: float,
    num_other: float,
    *,
    kind: BudgetKind = "processed",
    target: float | None = None,
    latency: float | None = None,
    pre_decoder: bool = False,
) -> Budget:
    """All costs of ``stages`` as fractions of the full backbone; ``target`` defaults to what is met.

    ``latency`` cannot be computed, only measured; it is passed on where it is known. ``pre_decoder``: whether the
    schedule `scores_before_decoder`, which is charged to ``processed`` (as `pre_decoder_share` of a layer over all
    vision tokens) and to ``flops``; the papers' count does not include it.
    """
    pre_decoder_cost = pre_decoder_share(shape) if pre_decoder else 0.0
    costs = {
        "processed": (sum(processed_ratios(stages, shape.num_layers)) + pre_decoder_cost) / shape.num_layers,
        "published": sum(published_ratios(stages, shape.num_layers)) / shape.num_layers,
        "flops": flops_ratio(stages, shape, num_vision, num_other, pre_decoder=pre_decoder),
        "kv": kv_ratio(stages, shape.num_layers, num_vision, num_other),
    }
    if latency is not None:
        costs["latency"] = latency
    return Budget(kind=kind, target=costs[kind] if target is None else target, **costs)
