"""Each rule against its formula, written out one head, text query and token at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pruning_runtime.attention_rows import attention_rows, padded_indices
from pruning_runtime.scorers import SCORERS, AttentionScorer, PositionScorer, make_scorer
from pruning_runtime.scorers.text_guided import text_importance

HEADS, LENGTH = 4, 10
# The second row has fewer text queries than the first, so that two of its entries are padding.
TEXT_QUERIES = [[1, 4, 6, 8, 9], [5, 7, 9]]
VISION = [[2, 3, 5, 7], [1, 2, 3, 4, 6]]
ATTENTION_RULES = sorted(name for name, rule in SCORERS.items() if issubclass(rule, AttentionScorer))


def attention_maps(seed: int = 0) -> Tensor:
    """Causal softmax attention, ``[batch, heads, length, length]`` float64, far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, HEADS, LENGTH, LENGTH, generator=generator, dtype=torch.float64)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return logits.masked_fill(~causal, float("-inf")).softmax(-1)


def rater_table(*, last_only: bool = False) -> tuple[Tensor, Tensor]:
    is_text_query = torch.zeros(2, LENGTH, dtype=torch.bool)
    for row, text_queries in enumerate(TEXT_QUERIES):
        is_text_query[row, text_queries] = True
    return padded_indices(is_text_query, 1 if last_only else 5, last_only=last_only)


def rows_of(maps: Tensor, positions: Tensor, real: Tensor) -> Tensor:
    """What `attention_rows` gives: the text queries' rows, zero where an entry is a padding."""
    index = positions[:, None, :, None].expand(-1, HEADS, -1, LENGTH)
    return (maps.gather(2, index) * real[:, None, :, None]).float()


def scores_of(rule: str, maps: Tensor) -> Tensor:
    scorer = make_scorer(rule)
    positions, real = rater_table(last_only=scorer.last_row_only)
    return scorer.score_heads(rows_of(maps, positions, real), positions, real)


def by_loops(rule: str, maps: Tensor, row: int, vision: int) -> float:
    """The published formulas, with nothing vectorised."""
    total = 0.0
    text_queries = TEXT_QUERIES[row]
    for head in range(HEADS):
        attention = maps[row, head].tolist()
        if rule == "last_token":
            total += attention[text_queries[-1]][vision]
            continue
        for text_query in text_queries:
            weight = 1.0
            if rule == "text_guided":
                weight = 0.0
                for other in text_queries:
                    weight += attention[other][text_query] + attention[text_query][other]
                    if other == text_query:
                        weight -= attention[text_query][text_query]
            total += weight * attention[text_query][vision]
    return total


@pytest.mark.parametrize("rule", ATTENTION_RULES)
@pytest.mark.parametrize("seed", range(3))
def test_an_attention_rule_equals_its_formula(rule: str, seed: int) -> None:
    maps = attention_maps(seed)
    scores = scores_of(rule, maps)
    for row, vision in enumerate(VISION):
        expected = [by_loops(rule, maps, row, token) for token in vision]
        assert scores[row, vision].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_rules_are_not_one_rule() -> None:
    """Were they, the formula test could hold for the wrong reason."""
    maps = attention_maps()
    # SparseVLM sums as `uniform_text` does, over text that it chooses beforehand.
    rules = [rule for rule in ATTENTION_RULES if rule != "sparsevlm"]
    orders = {rule: tuple(scores_of(rule, maps)[1, VISION[1]].argsort().tolist()) for rule in rules}
    assert len(set(orders.values())) == len(rules)


def test_text_importance_counts_attention_given_and_received_and_own_attention_once() -> None:
    # One head, two text queries at positions 0 and 2, and a vision token at 1.
    rows = torch.tensor([[[[1.0, 0.0, 0.0], [0.5, 0.2, 0.3]]]])
    weights = text_importance(rows, torch.tensor([[0, 2]]), torch.ones(1, 2, dtype=torch.bool))
    # Text query 0: own 1.0, received 0.5. Text query 2: own 0.3, given 0.5.
    torch.testing.assert_close(weights, torch.tensor([[[1.5, 0.8]]]))


def test_fillers_weigh_nothing_and_change_nothing() -> None:
    positions, real = rater_table()
    rows = rows_of(attention_maps(), positions, real)
    weights = text_importance(rows, positions, real)
    assert real[1].tolist() == [False, False, True, True, True]
    assert (weights[1, :, :2] == 0).all()
    alone = text_importance(rows[1:, :, 2:], positions[1:, 2:], real[1:, 2:])
    torch.testing.assert_close(weights[1:, :, 2:], alone)
    # A padding that points at a true text query must not count it a second time.
    doubled = positions.clone()
    doubled[1, :2] = positions[1, 2]
    torch.testing.assert_close(text_importance(rows, doubled, real), weights)


@pytest.mark.parametrize("rule", ATTENTION_RULES)
def test_heads_may_come_a_few_at_a_time(rule: str) -> None:
    maps, scorer = attention_maps(), make_scorer(rule)
    positions, real = rater_table(last_only=scorer.last_row_only)
    rows = rows_of(maps, positions, real)
    parts = sum(scorer.score_heads(rows[:, heads], positions, real) for heads in (slice(0, 1), slice(1, 4)))
    torch.testing.assert_close(parts, scorer.score_heads(rows, positions, real))


@pytest.mark.parametrize("rule", ATTENTION_RULES)
def test_higher_means_keep(rule: str) -> None:
    """A vision token that every query looks at scores above all others."""
    generator = torch.Generator().manual_seed(0)
    key = 0.1 * torch.randn(1, 2, LENGTH, 4, generator=generator)
    key[0, :, 3] = 5.0
    query = torch.ones(1, HEADS, LENGTH, 4)
    is_text_query = torch.zeros(1, LENGTH, dtype=torch.bool)
    is_text_query[0, 6:] = True
    scorer = make_scorer(rule)
    positions, real = padded_indices(
        is_text_query, 1 if scorer.last_row_only else 4, last_only=scorer.last_row_only
    )
    blocks = attention_rows(query, key, positions, real, None, 1.0)
    scores = sum(scorer.score_heads(block, positions, real) for block in blocks)
    assert scores.argmax(1).tolist() == [3]


# ---- rules that look at positions only


def vision_at(*rows: list[int], length: int) -> Tensor:
    vision = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, positions in enumerate(rows):
        vision[row, positions] = True
    return vision


def position_scores(rule: PositionScorer, vision: Tensor, keep: list[int], forward: int = 0) -> Tensor:
    """Scores where nothing has been dropped yet: every token stands at its own position."""
    position = torch.arange(vision.shape[1]).expand(vision.shape)
    return rule.score_positions(vision, position, torch.tensor(keep), forward)


def kept_ranks(rule: PositionScorer, vision: Tensor, keep: list[int]) -> list[list[int]]:
    """The ranks (0 = the row's first vision token) of the best, per row."""
    scores = position_scores(rule, vision, keep)
    return [
        sorted(row[seen].argsort(descending=True, stable=True)[:count].tolist())
        for row, seen, count in zip(scores, vision, keep, strict=True)
    ]


@pytest.mark.parametrize("before", [0, 1, 35])
@pytest.mark.parametrize("total", [1, 2, 7, 16, 100, 576])
def test_strided_gaps_differ_by_at_most_one(total: int, before: int) -> None:
    vision = vision_at(list(range(before, before + total)), length=before + total + 5)
    for count in {1, 2, 3, total // 4, total // 3, total // 2, total - 1, total} - {0}:
        if count > total:
            continue
        scores = position_scores(make_scorer("strided"), vision, [count])
        assert int(scores.sum()) == count  # the choice is by score alone, no tie decides
        (kept,) = kept_ranks(make_scorer("strided"), vision, [count])
        # Around the end and back to the first: the circle is cut evenly.
        gaps = {after - before for before, after in itertools.pairwise([*kept, kept[0] + total])}
        assert gaps <= {total // count, -(-total // count)}


def test_strided_spreads_each_row_over_its_own_tokens() -> None:
    vision = vision_at([0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 9, 11], [], length=12)
    assert kept_ranks(make_scorer("strided"), vision, [4, 2, 0]) == [[1, 3, 5, 7], [1, 3], []]


def test_strided_at_a_later_stage_strides_over_what_is_left() -> None:
    vision = torch.ones(1, 6, dtype=torch.bool)
    position = torch.tensor([[1, 2, 7, 30, 31, 32]])
    scores = make_scorer("strided").score_positions(vision, position, torch.tensor([3]), 0)
    assert scores.tolist() == [[0, 1, 0, 1, 0, 1]]


def test_random_orders_agree_between_stages() -> None:
    """The stages of one prefill are nested whatever was dropped before: a token keeps its score."""
    rule = make_scorer("random", {"seed": 3})
    whole = position_scores(rule, torch.ones(1, 50, dtype=torch.bool), [10])
    left = torch.tensor([[4, 9, 33]])
    later = rule.score_positions(torch.ones(1, 3, dtype=torch.bool), left, torch.tensor([1]), 0)
    assert torch.equal(later, whole.gather(1, left))
    assert len(set(whole[0].tolist())) == 50


def test_random_is_reproducible_and_shared_by_the_rows() -> None:
    vision = vision_at(list(range(64)), list(range(10, 40)), length=64)
    first = position_scores(make_scorer("random", {"seed": 7}), vision, [5, 5])
    torch.manual_seed(123)
    again = position_scores(make_scorer("random", {"seed": 7}), vision, [5, 5])
    assert torch.equal(first, again)
    assert torch.equal(first[0], first[1])


def test_random_differs_by_seed_and_by_prefill_and_leaves_the_global_generator_alone() -> None:
    vision = vision_at(list(range(64)), length=64)
    state = torch.random.get_rng_state()
    drawn = [
        tuple(position_scores(make_scorer("random", {"seed": seed}), vision, [5], prefill)[0].tolist())
        for seed in (0, 1, 2)
        for prefill in (0, 1, 2)
    ]
    assert len(set(drawn)) == 9
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- the table of rules


def test_the_table_names_every_rule_after_itself() -> None:
    attention = {"last_token", "sparsevlm", "text_guided", "uniform_text"}
    features = {"cdpruner", "dart", "divprune", "evs", "mmtok", "v2drop", "vidcom2"}
    assert attention | features | {"random", "strided"} <= set(SCORERS)
    assert all(name == rule.name for name, rule in SCORERS.items())
    assert {name for name in SCORERS if make_scorer(name).needs_attention} == attention


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("fastv", {}, "unknown scorer 'fastv'; known: cdpruner, "),
        ("text_guided", {"heads": 4}, "scorer 'text_guided' does not take the options {'heads': 4}"),
        ("random", {"seed": 0.5}, "seed must be an integer, found 0.5"),
    ],
)
def test_a_wrong_rule_or_option_is_refused_by_name(name: str, options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_scorer(name, options)
