"""Costs of a schedule: tokens per layer, FLOPs, cache entries. Kept tokens per layer are computed here only.

The *published* count of the papers counts a pruning layer at its size after pruning, although its attention and MLP
run on all its tokens. The *processed* count is what the layers compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from pruning_runtime.geometry import DecoderShape
from pruning_runtime.schedule import Budget, BudgetKind, Stage
from pruning_runtime.scorers import FeatureScorer, find_scorer

Kept = TypeVar("Kept")


def kept_per_layer(kept: Iterable[tuple[int, Kept]], full: Kept, num_layers: int) -> list[Kept]:
    """What each layer computes: ``full``, and after each stage's layer what that stage keeps.

    Args:
        kept: ``(layer, kept)`` of each stage in order; tokens leave after ``layer``.
        full: what layers before the first stage compute.
        num_layers: decoder layers.
    """
    stages = list(kept)
    counts = []
    for layer in range(num_layers):
        done = [number for stage, number in stages if stage < layer]
        counts.append(done[-1] if done else full)
    return counts


def processed_ratios(stages: Sequence[Stage], num_layers: int) -> list[float]:
    """Fraction of the vision tokens that each layer computes, ``num_layers`` numbers."""
    return kept_per_layer([(stage.layer, stage.keep_ratio) for stage in stages], 1.0, num_layers)


def published_ratios(stages: Sequence[Stage], num_layers: int) -> list[float]:
    """As `processed_ratios`, but a stage counts from its own layer on, as in the papers."""
    return kept_per_layer([(stage.layer - 1, stage.keep_ratio) for stage in stages], 1.0, num_layers)


def scores_before_decoder(stages: Sequence[Stage], scorer: str) -> bool:
    """Whether layer 0's queries and keys of all tokens are computed to score them before the decoder.

    ``scorer``: of stages that have none of their own.
    """
    if not stages or stages[0].layer != -1 or stages[0].keep_ratio >= 1:
        return False
    own = stages[0].scorer
    return find_scorer(scorer if own is None else own.name).needs_attention


def feature_scoring_flops(
    stages: Sequence[Stage], scorer: str, shape: DecoderShape, num_vision: float, num_other: float
) -> float:
    """FLOPs of all stages that are scored with hidden states (`FeatureScorer.flops`), for one prompt.

    Args:
        stages: of the schedule.
        scorer: of stages that have none of their own.
        shape: the decoder.
        num_vision, num_other: tokens of the prompt.
    """
    total, reaching = 0.0, 1.0
    for stage in stages:
        rule = find_scorer(scorer if stage.scorer is None else stage.scorer.name)
        if issubclass(rule, FeatureScorer) and stage.keep_ratio < reaching:
            total += rule.flops(
                reaching * num_vision, stage.keep_ratio * num_vision, shape.hidden_size, num_other
            )
        reaching = stage.keep_ratio
    return total


def feature_scoring_share(
    stages: Sequence[Stage], scorer: str, shape: DecoderShape, num_vision: float, num_other: float
) -> float:
    """`feature_scoring_flops` over the linear maps of a mean layer that computes the whole prompt."""
    linear = _linear_flops(shape)
    whole = sum(linear) / len(linear) * (num_vision + num_other)
    return feature_scoring_flops(stages, scorer, shape, num_vision, num_other) / whole if whole else 0.0


def pre_decoder_share(shape: DecoderShape) -> float:
    """Cost of scoring before the decoder: layer 0's query, key and value maps over the linear maps of a mean layer."""
    linear = _linear_flops(shape)
    return _scoring_flops(shape) / (sum(linear) / len(linear))


def layer_flops(shape: DecoderShape, tokens_per_layer: Sequence[float]) -> list[float]:
    """FLOPs of each layer over one prompt; a multiply-add counts as two.

    Counts what `DecoderShape.linear_flops` lists and the causal half of the two attention products, in sliding layers
    too. Norms, RoPE, scoring rows and the LM head are not counted.

    Args:
        shape: the decoder.
        tokens_per_layer: all tokens (vision, text, prefix) that each layer computes. A list of another length than
            the decoder's stands for as many mean layers.
    """
    linear, pairs = _linear_flops(shape), _pair_flops(shape)
    if len(tokens_per_layer) != shape.num_layers:
        count = len(tokens_per_layer)
        linear, pairs = [sum(linear) / len(linear)] * count, [sum(pairs) / len(pairs)] * count
    return [
        n * per_token + per_pair * n * (n + 1) / 2
        for n, per_token, per_pair in zip(tokens_per_layer, linear, pairs, strict=True)
    ]


def prefill_flops(
    shape: DecoderShape, tokens_per_layer: Sequence[float], *, pre_decoder_tokens: float = 0
) -> float:
    """FLOPs of the decoder's layers over one prompt: the sum of `layer_flops`, and scoring before the decoder.

    Args:
        shape, tokens_per_layer: as in `layer_flops`.
        pre_decoder_tokens: tokens whose queries and keys layer 0 computes once more to score them.
    """
    return sum(layer_flops(shape, tokens_per_layer)) + pre_decoder_tokens * _scoring_flops(shape)


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
    return (
        2 * shape.hidden_size * (shape.num_heads * shape.head_dim + shape.num_kv_heads * _head_width(shape))
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
    scorer: str | None = None,
) -> Budget:
    """All costs of ``stages`` as fractions of the unpruned backbone.

    Args:
        stages: of the schedule.
        shape: the decoder.
        num_vision, num_other: tokens of a typical prompt.
        kind: the cost that ``target`` limits.
        target: the limit; None: the cost itself.
        latency: measured elsewhere, and passed on; None where it was not measured.
        pre_decoder: whether the schedule `scores_before_decoder`. This cost is added to ``processed`` (as
            `pre_decoder_share`) and to ``flops``, not to ``published``.
        scorer: of stages that have none of their own; None: no cost of scoring with hidden states is added.
    """
    pre_decoder_cost = pre_decoder_share(shape) if pre_decoder else 0.0
    feature_flops = 0.0
    if scorer is not None:
        pre_decoder_cost += feature_scoring_share(stages, scorer, shape, num_vision, num_other)
        full = prefill_flops(shape, [num_vision + num_other] * shape.num_layers)
        feature_flops = feature_scoring_flops(stages, scorer, shape, num_vision, num_other) / full
    costs = {
        "processed": (sum(processed_ratios(stages, shape.num_layers)) + pre_decoder_cost) / shape.num_layers,
        "published": sum(published_ratios(stages, shape.num_layers)) / shape.num_layers,
        "flops": flops_ratio(stages, shape, num_vision, num_other, pre_decoder=pre_decoder) + feature_flops,
        "kv": kv_ratio(stages, shape.num_layers, num_vision, num_other),
    }
    if latency is not None:
        costs["latency"] = latency
    return Budget(kind=kind, target=costs[kind] if target is None else target, **costs)
