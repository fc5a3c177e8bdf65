"""Attention rows against a softmax in float64 over an explicit matrix of allowed keys."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pruning_runtime.attention_rows import attention_rows, find_text_queries, padded_indices

BATCH, LENGTH, HEAD_DIM = 2, 11, 8
SCALING = 0.4
# Query and key heads: plain, grouped, one key head for all.
GROUPINGS = [(6, 6), (6, 2), (4, 1)]
PER_HEAD = BATCH * 5 * LENGTH * 4
"""Bytes of one head's block in the cases below."""
CHUNKS = [1, PER_HEAD, 2 * PER_HEAD + 1, 3 * PER_HEAD, 4 * PER_HEAD, 1 << 30]

ROWS = torch.tensor([[3, 5, 6, 9, 10], [0, 1, 4, 8, 10]])
REAL = torch.tensor([[True] * 5, [False, True, True, True, True]])


def random_heads(heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    query = torch.randn(BATCH, heads, LENGTH, HEAD_DIM, generator=generator) * 2
    key = torch.randn(BATCH, kv_heads, LENGTH, HEAD_DIM, generator=generator) * 2
    return query, key


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def naive_rows(
    query: Tensor, key: Tensor, allowed: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """``[batch, heads, width, length]`` float64; ``allowed`` and ``bias`` fit ``[batch, heads, L, L]``."""
    heads = query.shape[1]
    key = key.double().repeat_interleave(heads // key.shape[1], 1)
    logits = query.double() @ key.transpose(2, 3) * SCALING
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.double()
    attention = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
    picked = torch.stack([attention[row, :, ROWS[row]] for row in range(BATCH)])
    for row in range(BATCH):
        picked[row, :, ~REAL[row]] = 0
    return picked


def found_rows(query: Tensor, key: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    blocks = list(attention_rows(query, key, ROWS, REAL, mask, SCALING, **options))
    assert all(block.dtype == torch.float32 for block in blocks)
    return torch.cat(blocks, 1)


def check(found: Tensor, expected: Tensor) -> None:
    assert not found.isnan().any()
    # Were heads or rows mixed up, the error would be of the order of the probabilities themselves.
    assert expected.amax() > 0.3
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)


def head_specific(heads: int) -> Tensor:
    """Bool ``[1, heads, L, L]``: causal, and each head is blind to another earlier key."""
    allowed = causal().repeat(heads, 1, 1)
    for head in range(heads):
        allowed[head, :, head % LENGTH] = False
    allowed |= torch.eye(LENGTH, dtype=torch.bool)
    return allowed[None]


def left_padded() -> Tensor:
    """Bool ``[batch, 1, L, L]``: causal, and the second row's first position is padding."""
    allowed = causal().repeat(BATCH, 1, 1, 1)
    allowed[1, 0, :, 0] = False
    return allowed


def additive(allowed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPINGS)
class TestMasks:
    """Each form in which a kernel may get its mask."""

    def test_none_is_causal(self, heads: int, kv_heads: int, chunk_bytes: int) -> None:
        query, key = random_heads(heads, kv_heads)
        expected = naive_rows(query, key, causal())
        check(found_rows(query, key, None, chunk_bytes=chunk_bytes), expected)

    @pytest.mark.parametrize("softcap", [0.7, 5.0])
    def test_softcap_bends_the_scaled_logits(
        self, heads: int, kv_heads: int, chunk_bytes: int, softcap: float
    ) -> None:
        query, key = random_heads(heads, kv_heads)
        expected = naive_rows(query, key, causal(), softcap=softcap)
        check(found_rows(query, key, None, softcap=softcap, chunk_bytes=chunk_bytes), expected)

    def test_bool_4d(self, heads: int, kv_heads: int, chunk_bytes: int) -> None:
        query, key = random_heads(heads, kv_heads)
        expected = naive_rows(query, key, left_padded())
        check(found_rows(query, key, left_padded(), chunk_bytes=chunk_bytes), expected)

    def test_bool_4d_shared_by_all_rows_of_the_batch(
        self, heads: int, kv_heads: int, chunk_bytes: int
    ) -> None:
        query, key = random_heads(heads, kv_heads)
        mask = (causal() & (torch.arange(LENGTH) != 2))[None, None]
        check(found_rows(query, key, mask, chunk_bytes=chunk_bytes), naive_rows(query, key, mask))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_additive_4d_with_one_head(
        self, heads: int, kv_heads: int, chunk_bytes: int, dtype: torch.dtype
    ) -> None:
        query, key = random_heads(heads, kv_heads)
        mask = additive(left_padded(), dtype)
        expected = naive_rows(query, key, left_padded())
        check(found_rows(query, key, mask, chunk_bytes=chunk_bytes), expected)

    def test_additive_4d_with_a_bias_per_head(self, heads: int, kv_heads: int, chunk_bytes: int) -> None:
        query, key = random_heads(heads, kv_heads)
        allowed = head_specific(heads)
        slopes = torch.arange(1, heads + 1)[None, :, None, None] * 0.1
        bias = slopes * torch.arange(LENGTH)
        mask = bias.masked_fill(~allowed, torch.finfo(torch.float32).min).expand(BATCH, -1, -1, -1)
        expected = naive_rows(query, key, allowed, bias)
        check(found_rows(query, key, mask, chunk_bytes=chunk_bytes), expected)

    def test_2d_key_validity(self, heads: int, kv_heads: int, chunk_bytes: int) -> None:
        query, key = random_heads(heads, kv_heads)
        valid = torch.ones(BATCH, LENGTH, dtype=torch.long)
        valid[1, 0] = 0
        expected = naive_rows(query, key, left_padded())
        check(found_rows(query, key, valid, chunk_bytes=chunk_bytes), expected)
        check(found_rows(query, key, valid.bool(), chunk_bytes=chunk_bytes), expected)

    @pytest.mark.parametrize("window", [1, 4, LENGTH])
    def test_sliding_window(self, heads: int, kv_heads: int, chunk_bytes: int, window: int) -> None:
        query, key = random_heads(heads, kv_heads)
        position = torch.arange(LENGTH)
        near = position[:, None] - position < window
        options = {"sliding_window": window, "chunk_bytes": chunk_bytes}
        check(found_rows(query, key, None, **options), naive_rows(query, key, causal() & near))
        valid = torch.ones(BATCH, LENGTH, dtype=torch.long)
        valid[1, 0] = 0
        check(
            found_rows(query, key, valid, **options),
            naive_rows(query, key, left_padded() & near | self_only()),
        )
        # A 4-D mask already holds its window, whatever that is.
        check(found_rows(query, key, left_padded(), **options), naive_rows(query, key, left_padded()))


def self_only() -> Tensor:
    """The one place where a padded position would see nothing at all; its row is a padding's."""
    allowed = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
    allowed[1, 0, 0, 0] = True
    return allowed


def test_bool_4d_per_head_with_fewer_heads_at_a_time() -> None:
    query, key = random_heads(6, 2)
    mask = head_specific(6).expand(BATCH, -1, -1, -1)
    check(found_rows(query, key, mask, chunk_bytes=1), naive_rows(query, key, mask))


def test_bool_4d_per_head_in_one_block() -> None:
    query, key = random_heads(6, 2)
    mask = head_specific(6).expand(BATCH, -1, -1, -1)
    check(found_rows(query, key, mask), naive_rows(query, key, mask))


@pytest.mark.parametrize("chunk_heads", range(14))
@pytest.mark.parametrize("group", [1, 2, 3, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 5])
def test_blocks_cover_every_head_once_and_in_order(kv_heads: int, group: int, chunk_heads: int) -> None:
    heads, length = kv_heads * group, 3
    # Head h asks for the constant h: its logits on the two keys differ by h, so its row tells its number.
    query = torch.arange(heads).float()[None, :, None, None].expand(1, heads, length, 1)
    key = torch.tensor([0.0, 0.1, -50.0])[None, None, :, None].expand(1, kv_heads, length, 1)
    rows, real = torch.tensor([[1]]), torch.tensor([[True]])
    per_head = length * 4
    blocks = list(attention_rows(query, key, rows, real, None, 1.0, chunk_bytes=chunk_heads * per_head))
    together = torch.cat(blocks, 1)[0, :, 0]
    told = (together[:, 1] / together[:, 0]).log() * 10
    assert told.round().long().tolist() == list(range(heads))
    for block in blocks:
        assert block.shape[1] <= max(chunk_heads, 1)


@pytest.mark.parametrize("mask_kind", ["none", "2d", "bool", "additive"])
def test_rows_that_may_see_nothing_are_zero_not_nan(mask_kind: str) -> None:
    query, key = random_heads(6, 2)
    nothing = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
    mask = {
        "none": None,
        "2d": torch.zeros(BATCH, LENGTH, dtype=torch.long),
        "bool": nothing,
        "additive": torch.zeros(nothing.shape).masked_fill(~nothing, float("-inf")),
    }[mask_kind]
    rows, fillers = torch.zeros(BATCH, 2, dtype=torch.long), torch.zeros(BATCH, 2, dtype=torch.bool)
    (block,) = attention_rows(query, key, rows, fillers, mask, SCALING)
    assert torch.equal(block, torch.zeros(BATCH, 6, 2, LENGTH))


def test_half_precision_gives_float32_probabilities_that_sum_to_one() -> None:
    query, key = (tensor.bfloat16() for tensor in random_heads(6, 2))
    found = found_rows(query, key, None)
    torch.testing.assert_close(found.sum(-1), REAL[:, None].expand(BATCH, 6, 5).float())
    # The products are rounded to bfloat16 (3 significant digits); the softmax is not.
    torch.testing.assert_close(found.double(), naive_rows(query, key, causal()), atol=0.02, rtol=0.05)


def test_a_row_puts_nothing_on_the_keys_behind_it() -> None:
    query, key = random_heads(6, 2)
    found = found_rows(query, key, None)
    for row, place in itertools.product(range(BATCH), range(5)):
        assert (found[row, :, place, int(ROWS[row, place]) + 1 :] == 0).all()


# ---- text queries

KINDS = st.sampled_from(["text", "vision", "padding"])


@st.composite
def rows_of_kinds(draw: st.DrawFn) -> list[list[str]]:
    length = draw(st.integers(1, 12))
    return draw(st.lists(st.lists(KINDS, min_size=length, max_size=length), min_size=1, max_size=4))


def oracle_raters(kinds: list[str]) -> list[int]:
    if "vision" not in kinds:
        return []
    return [place for place in range(kinds.index("vision"), len(kinds)) if kinds[place] == "text"]


def rater_mask(rows: list[list[str]]) -> Tensor:
    vision = torch.tensor([[kind == "vision" for kind in row] for row in rows])
    valid = torch.tensor([[kind != "padding" for kind in row] for row in rows])
    return find_text_queries(vision, valid)


@given(rows_of_kinds())
@settings(deadline=None, max_examples=100)
def test_raters_are_text_after_the_row_s_first_vision_token(rows: list[list[str]]) -> None:
    for row, found in zip(rows, rater_mask(rows), strict=True):
        assert found.nonzero()[:, 0].tolist() == oracle_raters(row)


@given(rows_of_kinds(), st.data())
@settings(deadline=None, max_examples=100)
def test_index_raters_lists_each_once_in_order(rows: list[list[str]], data: st.DataObject) -> None:
    text_queries = [oracle_raters(row) for row in rows]
    width = data.draw(st.integers(max([1, *map(len, text_queries)]), len(rows[0])))
    positions, real = padded_indices(rater_mask(rows), width)
    assert positions.shape == real.shape == (len(rows), width)
    assert ((positions >= 0) & (positions < len(rows[0]))).all()
    for row, wanted in enumerate(text_queries):
        assert positions[row][real[row]].tolist() == wanted


@given(rows_of_kinds())
@settings(deadline=None, max_examples=100)
def test_last_only_takes_each_row_s_last_rater(rows: list[list[str]]) -> None:
    positions, real = padded_indices(rater_mask(rows), 1, last_only=True)
    assert positions.shape == real.shape == (len(rows), 1)
    for row, kinds in enumerate(rows):
        wanted = oracle_raters(kinds)[-1:]
        assert positions[row][real[row]].tolist() == wanted
