"""Costs of a schedule: both token counts, FLOPs and cache entries."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_runtime import Stage
from pruning_runtime.costs import (
    budget_of,
    flops_ratio,
    kept_per_layer,
    pre_decoder_share,
    prefill_flops,
    processed_ratios,
    published_ratios,
    scores_before_decoder,
)
from pruning_runtime.geometry import DecoderShape
from pruning_runtime.schedule import ScorerChoice

LLAVA_7B = DecoderShape(
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=11008,
    vocab_size=32064,
)
QWEN_2B = DecoderShape(
    num_layers=28,
    hidden_size=1536,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    intermediate_size=8960,
    vocab_size=151936,
)
NUM_LAYERS = LLAVA_7B.num_layers


@st.composite
def stage_lists(draw: st.DrawFn, *, always: frozenset[int] = frozenset()) -> list[Stage]:
    layers = sorted(always | draw(st.sets(st.integers(-1, NUM_LAYERS - 2), max_size=5)))
    ratios = draw(st.lists(st.floats(0, 1), min_size=len(layers), max_size=len(layers)))
    return [
        Stage(layer=layer, keep_ratio=ratio)
        for layer, ratio in zip(layers, sorted(ratios, reverse=True), strict=True)
    ]


prompts = st.tuples(st.integers(1, 4000), st.integers(1, 500))


def test_a_stage_s_own_layer_is_processed_in_full_but_published_as_pruned() -> None:
    stages = [Stage(layer=1, keep_ratio=0.5), Stage(layer=3, keep_ratio=0.0)]
    assert processed_ratios(stages, 6) == [1.0, 1.0, 0.5, 0.5, 0.0, 0.0]
    assert published_ratios(stages, 6) == [1.0, 0.5, 0.5, 0.0, 0.0, 0.0]


def test_before_the_decoder_both_counts_agree() -> None:
    stages = [Stage(layer=-1, keep_ratio=64 / 576)]
    assert processed_ratios(stages, 4) == published_ratios(stages, 4) == [64 / 576] * 4


@given(stage_lists())
@settings(deadline=None, max_examples=50)
def test_processed_is_published_one_layer_later(stages: list[Stage]) -> None:
    processed, published = processed_ratios(stages, NUM_LAYERS), published_ratios(stages, NUM_LAYERS)
    assert len(processed) == len(published) == NUM_LAYERS
    assert processed[1:] == published[:-1]
    assert all(real >= claimed for real, claimed in zip(processed, published, strict=True))
    assert processed == sorted(processed, reverse=True)


@given(prompts, st.sets(st.integers(-1, NUM_LAYERS - 2), max_size=4))
@settings(deadline=None, max_examples=50)
def test_keeping_everything_costs_exactly_everything(prompt: tuple[int, int], layers: set[int]) -> None:
    stages = [Stage(layer=layer, keep_ratio=1.0) for layer in sorted(layers)]
    budget = budget_of(stages, LLAVA_7B, *prompt)
    assert (budget.processed, budget.published, budget.flops) == (1.0, 1.0, 1.0)


@given(stage_lists().filter(bool), prompts, st.data())
@settings(deadline=None, max_examples=100)
def test_no_cost_grows_when_a_ratio_shrinks(
    stages: list[Stage], prompt: tuple[int, int], data: st.DataObject
) -> None:
    changed = data.draw(st.integers(0, len(stages) - 1))
    lowest = stages[changed + 1].keep_ratio if changed + 1 < len(stages) else 0.0
    smaller = data.draw(st.floats(lowest, stages[changed].keep_ratio))
    fewer = [*stages]
    fewer[changed] = Stage(layer=stages[changed].layer, keep_ratio=smaller)
    more_cost, less_cost = budget_of(stages, LLAVA_7B, *prompt), budget_of(fewer, LLAVA_7B, *prompt)
    # Sums of floats in another order: equal costs may differ in the last bits.
    slack = 1e-12
    assert less_cost.processed <= more_cost.processed + slack
    assert less_cost.published <= more_cost.published + slack
    assert less_cost.flops <= more_cost.flops + slack


def test_a_ratio_that_shrinks_by_much_saves() -> None:
    full = flops_ratio([Stage(layer=1, keep_ratio=0.9)], LLAVA_7B, 576, 64)
    less = flops_ratio([Stage(layer=1, keep_ratio=0.1)], LLAVA_7B, 576, 64)
    assert less < 0.5 * full


@given(stage_lists(), prompts)
@settings(deadline=None, max_examples=50)
def test_a_budget_holds_all_costs_and_meets_itself(stages: list[Stage], prompt: tuple[int, int]) -> None:
    for kind in ("processed", "published", "flops"):
        budget = budget_of(stages, QWEN_2B, *prompt, kind=kind)
        assert budget.kind == kind
        assert budget.target == getattr(budget, kind)
    assert budget_of(stages, QWEN_2B, *prompt, target=0.125).target == 0.125
    assert budget.processed >= budget.published
    assert budget.processed == sum(processed_ratios(stages, 28)) / 28
    assert budget.flops == flops_ratio(stages, QWEN_2B, *prompt)


def test_flops_of_one_layer_by_hand() -> None:
    # 3 tokens. Projections: q and o 4 x 4, k and v 4 x 2; gated MLP three times 4 x 5.
    shape = DecoderShape(
        num_layers=1,
        hidden_size=4,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        intermediate_size=5,
        vocab_size=9,
    )
    linear = 3 * 2 * (2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 5)
    # q k^T and p v: 2 heads x 2 features, a multiply-add for each of the 1 + 2 + 3 causal pairs.
    products = 2 * (2 * 2 * 2) * (1 + 2 + 3)
    assert prefill_flops(shape, [3]) == linear + products
    assert prefill_flops(shape, [3, 0, 3]) == 2 * (linear + products)


def test_flops_of_llava_7b_are_near_two_per_weight_and_token() -> None:
    # 6.48e9 weights in the decoder's layers; attention adds 4 % at 640 tokens.
    per_token = prefill_flops(LLAVA_7B, [640] * 32) / 640
    assert per_token == pytest.approx(2 * 6.476e9, rel=0.05)


def test_kept_per_layer_changes_after_a_stage_s_own_layer() -> None:
    assert kept_per_layer([(-1, "half"), (2, "few")], "all", 5) == ["half"] * 3 + ["few"] * 2
    assert kept_per_layer([], (7, 3), 2) == [(7, 3)] * 2


@pytest.mark.parametrize(
    ("stages", "scorer", "pre_decoder"),
    [
        ([(-1, 0.5)], "text_guided", True),
        ([(-1, 0.5), (3, 0.1)], "last_token", True),
        ([(-1, 0.5)], "strided", False),
        ([(-1, 1.0)], "text_guided", False),
        ([(0, 0.5)], "text_guided", False),
        ([], "text_guided", False),
    ],
)
def test_what_is_scored_before_the_decoder(
    stages: list[tuple[int, float]], scorer: str, pre_decoder: bool
) -> None:
    made = [Stage(layer=layer, keep_ratio=ratio) for layer, ratio in stages]
    assert scores_before_decoder(made, scorer) is pre_decoder


def test_the_first_stage_s_own_scorer_decides() -> None:
    own = ScorerChoice(name="strided")
    assert not scores_before_decoder([Stage(layer=-1, keep_ratio=0.5, scorer=own)], "text_guided")
    own = ScorerChoice(name="text_guided")
    assert scores_before_decoder([Stage(layer=-1, keep_ratio=0.5, scorer=own)], "strided")


def test_the_share_of_scoring_before_the_decoder() -> None:
    """Three of the four square maps of attention beside an MLP of 11008, and Qwen's grouped keys and values."""
    square = 4096 * 4096
    assert pre_decoder_share(LLAVA_7B) == pytest.approx(3 * square / (4 * square + 3 * 4096 * 11008))
    pre_decoder_cost = 1536 * (1536 + 2 * 2 * 128)
    assert pre_decoder_share(QWEN_2B) == pytest.approx(
        pre_decoder_cost / (pre_decoder_cost + 1536 * 1536 + 3 * 1536 * 8960)
    )


@given(stage_lists(always=frozenset({-1})), prompts)
@settings(deadline=None, max_examples=50)
def test_pre_decoder_scoring_is_charged_once(stages: list[Stage], prompt: tuple[int, int]) -> None:
    free = budget_of(stages, QWEN_2B, *prompt)
    charged = budget_of(stages, QWEN_2B, *prompt, pre_decoder=True)
    assert charged.processed - free.processed == pytest.approx(
        pre_decoder_share(QWEN_2B) / QWEN_2B.num_layers
    )
    assert (charged.published, charged.kv) == (free.published, free.kv)
    layers = QWEN_2B.num_layers
    linear = sum(prompt) * prefill_flops(QWEN_2B, [1]) - sum(prompt) * 2 * 2 * 12 * 128
    more = (charged.flops - free.flops) * prefill_flops(QWEN_2B, [sum(prompt)] * layers)
    assert more == pytest.approx(pre_decoder_share(QWEN_2B) * linear, rel=1e-6)
