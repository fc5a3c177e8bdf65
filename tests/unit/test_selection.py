"""Which tokens stay, against an no-scoring bound in plain Python: one row, one token at a time."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pruning_runtime import Stage
from pruning_runtime.merging import merge_dropped
from pruning_runtime.selection import StagePlan, gather_positions, plan_stages, select_kept

TEXT, VISION, PADDING = "text", "vision", "padding"
# A protected vision token.
SEPARATOR = "image newline"
# A vision token that an earlier stage dropped and kept as a padding: no longer valid, so it is padding.
FILLER = "padding"
# Few different values, so that ties are common; the extremes of float32 are no special values.
SCORES = st.sampled_from([0.0, 1.0, -1.0, 0.5, 3.0e38, -3.0e38, math.inf, -math.inf, math.nan])


@dataclass(frozen=True)
class Row:
    """One row of a batch: what stands at each position, its score, and how many vision tokens stay."""

    kinds: tuple[str, ...]
    scores: tuple[float, ...]
    keep: int

    @property
    def num_vision(self) -> int:
        return self.kinds.count(VISION) + self.kinds.count(SEPARATOR)

    @property
    def kept_length(self) -> int:
        return self.kinds.count(TEXT) + self.keep


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Row], int]:
    """Rows of one length and a width that holds what each of them keeps."""
    length = draw(st.integers(1, 14))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        kinds = st.sampled_from([TEXT, VISION, SEPARATOR, PADDING, FILLER])
        row = Row(
            tuple(draw(st.lists(kinds, min_size=length, max_size=length))),
            tuple(draw(st.lists(SCORES, min_size=length, max_size=length))),
            keep=0,
        )
        rows.append(replace(row, keep=draw(st.integers(0, row.num_vision))))
    width = draw(st.integers(max(row.kept_length for row in rows), length))
    return rows, width


def select_rows(rows: list[Row], width: int) -> tuple[Tensor, Tensor]:
    """`select_kept` on these rows."""
    return select_kept(
        torch.tensor([row.scores for row in rows]),
        torch.tensor([[kind in (VISION, SEPARATOR, FILLER) for kind in row.kinds] for row in rows]),
        torch.tensor([[kind in (TEXT, VISION, SEPARATOR) for kind in row.kinds] for row in rows]),
        torch.tensor([row.keep for row in rows]),
        width,
        # Read at vision tokens only, so what it says of the others must not matter.
        torch.tensor([[kind != VISION for kind in row.kinds] for row in rows]),
    )


def rank_key(row: Row, position: int) -> tuple[bool, float, int]:
    """Best first: image newlines, then by score, then by position; NaN is as low as -inf."""
    if row.kinds[position] == SEPARATOR:
        return (False, 0.0, position)
    score = row.scores[position]
    return (True, math.inf if math.isnan(score) else -score, position)


def expected(row: Row, width: int) -> tuple[list[int], list[bool]]:
    """Fillers first (dropped tokens before padding: padding is used up first), then what stays."""
    text, vision, padding = (
        [place for place, kind in enumerate(row.kinds) if kind in kinds]
        for kinds in ((TEXT,), (VISION, SEPARATOR), (PADDING, FILLER))
    )
    best = sorted(vision, key=lambda position: rank_key(row, position))[: row.keep]
    kept = sorted(text + best)
    dropped = sorted(set(vision) - set(best))
    fillers = (dropped + padding)[-(width - len(kept)) or len(row.kinds) :]
    return fillers + kept, [False] * len(fillers) + [True] * len(kept)


@given(batches())
@settings(deadline=None, max_examples=200)
def test_select_kept_equals_the_oracle(batch: tuple[list[Row], int]) -> None:
    rows, width = batch
    index, is_kept = select_rows(rows, width)
    assert index.shape == is_kept.shape == (len(rows), width)
    assert is_kept.dtype == torch.bool
    for row, found, real in zip(rows, index.tolist(), is_kept.tolist(), strict=True):
        assert (found, real) == expected(row, width)


@given(batches(), st.permutations(range(4)))
@settings(deadline=None, max_examples=50)
def test_a_row_does_not_depend_on_the_others(batch: tuple[list[Row], int], order: list[int]) -> None:
    rows, width = batch
    order = [row for row in order if row < len(rows)]
    together = select_rows(rows, width)
    shuffled = select_rows([rows[row] for row in order], width)
    for one, other in zip(together, shuffled, strict=True):
        assert torch.equal(one[order], other)


# The no-scoring bound could be wrong in the same way; these are by hand.


def select(scores: list[float], kinds: str, keep: int, width: int) -> tuple[list[int], list[bool]]:
    """One row; ``kinds`` has a letter per position: text, vision, image newline, padding."""
    vision = torch.tensor([[kind in "vs" for kind in kinds]])
    valid = torch.tensor([[kind != "p" for kind in kinds]])
    protected = torch.tensor([[kind == "s" for kind in kinds]]) if "s" in kinds else None
    index, is_kept = select_kept(
        torch.tensor([scores]), vision, valid, torch.tensor([keep]), width, protected
    )
    return index[0].tolist(), is_kept[0].tolist()


def test_higher_scores_stay_in_their_order() -> None:
    assert select([9.0, 0.1, 0.4, 0.2, 0.3, 9.0], "tvvvvt", 2, 4) == ([0, 2, 4, 5], [True] * 4)


def test_ties_go_to_the_earlier_position() -> None:
    assert select([0.0, 1.0, 1.0, 1.0, 0.0], "tvvvt", 2, 4) == ([0, 1, 2, 4], [True] * 4)


def test_nan_ranks_below_every_number() -> None:
    nan = math.nan
    assert select([nan, nan, -1.0, -3.0e38, nan], "tvvvt", 2, 4) == ([0, 2, 3, 4], [True] * 4)


def test_infinite_scores_are_ordinary_ends_of_the_range() -> None:
    assert select([-math.inf, 0.0, math.inf, 5.0], "vvvv", 2, 2) == ([2, 3], [True] * 2)
    assert select([-math.inf] * 3 + [0.0], "vvvt", 2, 3) == ([0, 1, 3], [True] * 3)


def test_separators_stay_before_any_score() -> None:
    inf = math.inf
    assert select([inf, 5.0, -inf, inf, math.nan, 0.0], "vvsvst", 3, 4) == ([0, 2, 4, 5], [True] * 4)


def test_where_not_all_separators_can_stay_the_first_do() -> None:
    assert select([0.0, 1.0, 9.0, 2.0, 9.0, 3.0], "tsvsvs", 2, 3) == ([0, 1, 3], [True] * 3)
    assert select([0.0, 1.0, 9.0, 2.0, 9.0, 3.0], "tsvsvs", 0, 1) == ([0], [True])


def test_a_text_token_s_score_is_never_read() -> None:
    assert select([-math.inf, 1.0, math.inf], "tvt", 0, 2) == ([0, 2], [True] * 2)


def test_padding_fills_before_dropped_tokens_do() -> None:
    assert select([0.0, 0.0, 2.0, 1.0, 0.0], "ppvvt", 1, 4) == ([0, 1, 2, 4], [False, False, True, True])
    assert select([0.0, 0.0, 2.0, 1.0, 0.0], "ppvvt", 1, 5) == ([3, 0, 1, 2, 4], [False] * 3 + [True] * 2)


def test_a_filler_of_an_earlier_stage_takes_no_place_of_a_kept_token() -> None:
    scores, vision = torch.tensor([[9.0, 1.0, 2.0, 0.0]]), torch.tensor([[True, True, True, False]])
    valid = torch.tensor([[False, True, True, True]])
    index, is_kept = select_kept(scores, vision, valid, torch.tensor([1]), 3)
    assert (index.tolist(), is_kept.tolist()) == ([[0, 2, 3]], [[False, True, True]])


def test_a_row_without_vision_tokens_keeps_its_text() -> None:
    assert select([0.0] * 4, "pptt", 0, 3) == ([1, 2, 3], [False, True, True])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_any_precision_rank_alike(dtype: torch.dtype) -> None:
    scores = torch.tensor([[0.5, 0.25, 4.0, math.nan]], dtype=dtype)
    valid = torch.ones(1, 4, dtype=torch.bool)
    vision = torch.tensor([[False, True, True, True]])
    for keep, kept in ((1, [0, 2]), (2, [0, 1, 2]), (3, [0, 1, 2, 3])):
        index, _ = select_kept(scores, vision, valid, torch.tensor([keep]), keep + 1)
        assert index.tolist() == [kept]


# ---- plans


@st.composite
def schedules_and_rows(draw: st.DrawFn) -> tuple[list[Stage], list[int], list[int]]:
    layers = sorted(draw(st.sets(st.integers(-1, 30), max_size=5)))
    ratios = sorted(
        draw(st.lists(st.floats(0, 1) | st.just(1.0), min_size=len(layers), max_size=len(layers))),
        reverse=True,
    )
    rows = draw(st.integers(1, 4))
    counts = st.lists(st.integers(0, 600), min_size=rows, max_size=rows)
    stages = [Stage(layer=layer, keep_ratio=ratio) for layer, ratio in zip(layers, ratios, strict=True)]
    return stages, draw(counts), draw(counts)


def expected_plan(stages: list[Stage], num_vision: list[int], num_other: list[int]) -> list[StagePlan]:
    plan, before = [], list(num_vision)
    for stage in stages:
        keep = [math.floor(stage.keep_ratio * vision + 0.5) for vision in num_vision]
        if any(now < then for now, then in zip(keep, before, strict=True)):
            lengths = [kept + other for kept, other in zip(keep, num_other, strict=True)]
            plan.append(StagePlan(stage.layer, tuple(keep), max(lengths), len(set(lengths)) > 1, max(keep)))
        before = keep
    return plan


@given(schedules_and_rows())
@settings(deadline=None, max_examples=200)
def test_plan_stages_equals_the_oracle(case: tuple[list[Stage], list[int], list[int]]) -> None:
    stages, num_vision, num_other = case
    plan = plan_stages(stages, num_vision, num_other)
    assert list(plan) == expected_plan(*case)
    for before, after in itertools.pairwise(plan):
        assert all(later <= earlier for later, earlier in zip(after.keep, before.keep, strict=True))
        assert after.width <= before.width


def test_ratios_of_one_and_rows_without_vision_plan_nothing() -> None:
    everywhere = [Stage(layer=layer, keep_ratio=1.0) for layer in range(3)]
    assert plan_stages(everywhere, [16, 0], [5, 9]) == ()
    assert plan_stages([Stage(layer=0, keep_ratio=0.0)], [0, 0], [5, 9]) == ()


def test_ratios_count_from_the_original_tokens() -> None:
    stages = [Stage(layer=0, keep_ratio=0.5), Stage(layer=3, keep_ratio=0.25)]
    assert plan_stages(stages, [16, 8], [4, 12]) == (
        StagePlan(0, (8, 4), 16, padded=True, most_kept=8),
        StagePlan(3, (4, 2), 14, padded=True, most_kept=4),
    )


# ---- gathering


@given(
    batch=st.integers(1, 3),
    shared=st.booleans(),
    before=st.lists(st.integers(1, 3), max_size=2),
    after=st.lists(st.integers(1, 3), max_size=2),
    length=st.integers(1, 6),
    data=st.data(),
)
@settings(deadline=None, max_examples=100)
def test_gather_positions_picks_each_row_s_entries(
    batch: int, shared: bool, before: list[int], after: list[int], length: int, data: st.DataObject
) -> None:
    # The batch stands right before the sequence; M-RoPE tables and stacked streams have more in front.
    shape = [*before, 1 if shared else batch, length, *after]
    dim = 1 + len(before)
    tensor = torch.arange(math.prod(shape)).view(shape)
    width = data.draw(st.integers(1, length))
    index = data.draw(
        st.lists(
            st.lists(st.integers(0, length - 1), min_size=width, max_size=width),
            min_size=batch,
            max_size=batch,
        )
    )
    found = gather_positions(tensor, torch.tensor(index), dim)
    assert found.shape == (*before, batch, width, *after)
    for row in range(batch):
        expected = tensor.select(dim - 1, 0 if shared else row).index_select(
            dim - 1, torch.tensor(index[row])
        )
        assert torch.equal(found.select(dim - 1, row), expected)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), seed=st.integers(0, 9999))
def test_merging_equals_the_oracle(data: st.DataObject, seed: int) -> None:
    """Two stages, token by token: who takes in the others, the mean, and how many tokens it stands for."""
    rng = torch.Generator().manual_seed(seed)
    batch, length = 3, 10
    hidden = torch.randn(batch, length, 4, generator=rng)
    vision = torch.rand(batch, length, generator=rng) < 0.7
    valid = torch.rand(batch, length, generator=rng) < 0.9
    states = [{p: hidden[row, p] for p in range(length)} for row in range(batch)]
    weight = [dict.fromkeys(range(length), 1.0) for _ in range(batch)]
    index = torch.arange(length).expand(batch, -1)
    weights = None
    for _ in range(2):
        scores = torch.rand(index.shape, generator=rng)
        seen = vision.gather(1, index) & valid
        keep = torch.tensor([data.draw(st.integers(0, int(count))) for count in seen.sum(1)])
        standing = None if weights is None else seen & (weights > 1)
        width = int((valid.sum(1) - seen.sum(1) + keep).max())
        place, kept = select_kept(scores, seen, valid, keep, width, standing)
        for row in range(batch):
            alive = [int(index[row, p]) for p in range(index.shape[1]) if seen[row, p]]
            score = {int(index[row, p]): float(scores[row, p]) for p in range(index.shape[1]) if seen[row, p]}
            left = [
                int(index[row, p]) for p, k in zip(place[row], kept[row], strict=True) if k and seen[row, p]
            ]
            gone = [p for p in alive if p not in left]
            if left and gone:
                slot = next((p for p in left if weight[row][p] > 1), min(left, key=score.__getitem__))
                members = [slot, *gone]
                total = sum(weight[row][p] for p in members)
                states[row][slot] = sum(weight[row][p] * states[row][p] for p in members) / total
                weight[row][slot] = total
        hidden, weights = merge_dropped(hidden, weights, scores, seen, valid, place, kept)
        index, valid = index.gather(1, place), kept
        for row in range(batch):
            for p in range(index.shape[1]):
                if valid[row, p]:
                    torch.testing.assert_close(hidden[row, p], states[row][int(index[row, p])])
                    assert float(weights[row, p]) == pytest.approx(weight[row][int(index[row, p])])


def test_no_token_is_forgotten() -> None:
    """As long as a row keeps one, its tokens stand for all that there were."""
    hidden, scores = torch.randn(1, 9, 4), torch.rand(1, 9)
    every = torch.ones(1, 9, dtype=torch.bool)
    place, kept = select_kept(scores, every, every, torch.tensor([3]), 3)
    states, weights = merge_dropped(hidden, None, scores, every, every, place, kept)
    assert weights.sum() == 9
    torch.testing.assert_close((states * weights[..., None]).sum(1), hidden.sum(1))
