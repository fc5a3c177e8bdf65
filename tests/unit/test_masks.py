"""Masks of shortened sequences against loops over original positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pruning_runtime.masks import AttentionSpan, kernel_mask, shortened_mask
from pruning_runtime.merging import weighted_mask
from pruning_runtime.sequence import PrunedPrompt, Segment, restore_length

LENGTH = 9
# Two rows; the second begins with two places of padding and is filled up with one of them.
INDEX = torch.tensor([[0, 2, 3, 7, 8], [1, 2, 4, 5, 8]])
VALID = torch.tensor([[True] * 5, [False, True, True, True, True]])


def may_see(
    query: int, key: int, *, window: int | None = None, chunk: int | None = None, first: int = 0
) -> bool:
    if key > query:
        return False
    if window is not None and query - key >= window:
        return False
    return chunk is None or (query - first) // chunk == (key - first) // chunk


@pytest.mark.parametrize("limits", [{}, {"window": 3}, {"chunk": 4}, {"window": 1}])
def test_reach_counts_original_positions(limits: dict[str, int]) -> None:
    first = torch.tensor([[0], [2]])
    allowed = AttentionSpan(**limits).allows(INDEX, INDEX, first)
    for row in range(2):
        for q, query in enumerate(INDEX[row].tolist()):
            for k, key in enumerate(INDEX[row].tolist()):
                expected = may_see(query, key, **limits, first=int(first[row]))
                assert bool(allowed[row, q, k]) == expected, (row, query, key)
    assert AttentionSpan(**limits).limited is bool(limits)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_a_models_own_mask_is_cut_to_what_is_left(additive: bool, heads: int, shared: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.rand(1 if shared else 2, heads, LENGTH, LENGTH, generator=generator) > 0.4
    mask: Tensor = (
        torch.zeros(own.shape).masked_fill(~own, torch.finfo(torch.float32).min) if additive else own
    )
    found = shortened_mask(mask, INDEX, INDEX, VALID)
    assert found.shape == (2, heads, 5, 5)
    sees = found == 0 if additive else found
    for row in range(2):
        for head in range(heads):
            for q, query in enumerate(INDEX[row].tolist()):
                for k, key in enumerate(INDEX[row].tolist()):
                    expected = bool(own[0 if shared else row, head, query, key]) and bool(VALID[row, k])
                    assert bool(sees[row, head, q, k]) == expected


def test_rows_that_the_model_cut_itself_stay() -> None:
    """A layer that is given the last token alone gets a mask of one row."""
    mask = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    mask[1, 0, 0, 4] = False
    found = shortened_mask(mask, INDEX, INDEX, VALID)
    assert found.shape == (2, 1, 1, 5)
    assert found[0, 0, 0].tolist() == [True] * 5
    assert found[1, 0, 0].tolist() == [False, True, False, True, True]


def test_key_validity_is_gathered_and_fillers_are_blanked() -> None:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, 7] = 0
    found = shortened_mask(mask, INDEX, INDEX, VALID)
    assert found.tolist() == [[1, 1, 1, 0, 1], [0, 1, 1, 1, 1]]


def test_each_kernel_gets_its_own_kind_of_mask() -> None:
    allowed = torch.tensor([[[True, False], [True, True]]])
    valid = torch.tensor([[True, True]])
    assert torch.equal(kernel_mask(allowed, valid, "sdpa", torch.float16), allowed[:, None])
    eager = kernel_mask(allowed, valid, "eager", torch.float16)
    assert eager.dtype == torch.float16
    assert eager[0, 0].tolist() == [[0, torch.finfo(torch.float16).min], [0, 0]]
    assert kernel_mask(allowed, valid, "flash_attention_2", torch.float16) is valid


def test_keys_that_left_since_are_no_longer_there() -> None:
    before = Segment(INDEX, VALID, padded=True)
    after = Segment(torch.tensor([[0, 7, 8], [2, 4, 8]]), torch.ones(2, 3, dtype=torch.bool), padded=False)
    prompt = PrunedPrompt(LENGTH, [before, after])
    assert torch.equal(prompt.remaining(before, before), VALID)
    assert prompt.remaining(before, after).tolist() == [
        [True, False, False, True, True],
        [False, True, True, False, True],
    ]


def test_hidden_states_go_back_to_their_places() -> None:
    prompt = PrunedPrompt(LENGTH, [Segment(INDEX, VALID, padded=True)])
    hidden = torch.arange(1.0, 11.0).view(2, 5, 1)
    (restored,) = restore_length((hidden,), prompt)
    assert restored[0, :, 0].tolist() == [1, 0, 2, 3, 0, 0, 0, 4, 5]
    assert restored[1, :, 0].tolist() == [0, 0, 7, 0, 8, 9, 0, 0, 10]


@pytest.mark.parametrize("additive", [False, True])
def test_a_key_that_stands_for_three_is_attended_to_as_three(additive: bool) -> None:
    """Attention over repeated keys equals attention over one of them, weighted."""
    query, key, value = torch.randn(3, 1, 1, 4, 8).unbind()
    repeated = torch.tensor([0, 1, 1, 1, 3])
    allowed = torch.tensor([[[[True, True, False, True]] * 4]])
    mask = (
        torch.zeros(1, 1, 4, 4).masked_fill(~allowed, torch.finfo(torch.float32).min) if additive else allowed
    )
    weights = torch.tensor([[1.0, 3.0, 1.0, 1.0]])
    attention = torch.nn.functional.scaled_dot_product_attention
    found = attention(query, key, value, weighted_mask(mask, weights, torch.float32))
    torch.testing.assert_close(found, attention(query, key[:, :, repeated], value[:, :, repeated]))
    assert not torch.allclose(found, attention(query, key, value, allowed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weighted_masks_stay_finite_where_kernels_count_in_powers_of_two(dtype: torch.dtype) -> None:
    """They multiply all logits by log2(e), in float32; a row that sees nothing must not become NaN there."""
    mask = torch.tensor([[[[True, False], [False, False]]]])
    made = weighted_mask(mask, torch.tensor([[5.0, 1.0]]), dtype)
    assert made.dtype == dtype
    assert (made.float() / math.log(2)).isfinite().all()
    assert made[0, 0, 0].float().softmax(0).tolist() == [1, 0]
