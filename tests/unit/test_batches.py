"""Batches of similar length: which samples they hold, and what padding they save."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedule_finder.measuring.batches import similar_lengths


def padded(lengths: list[int], batches: list[list[int]]) -> int:
    """Positions that are computed, padding included."""
    return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200), st.integers(1, 40))
def test_every_sample_is_in_one_batch_and_the_first_ones_are_whole_batches(
    lengths: list[int], most: int
) -> None:
    batches = similar_lengths(lengths, most)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    size = max(2**power for power in range(6) if 2**power <= most)
    assert max(map(len, batches)) <= size
    for end in (2**power for power in range(8) if size <= 2**power < len(lengths)):
        first = batches[: end // size]
        assert sorted(row for batch in first for row in batch) == list(range(end))
    starts = range(0, len(lengths), size)
    in_turn = [list(range(start, min(start + size, len(lengths)))) for start in starts]
    assert len(batches) == len(in_turn)
    assert padded(lengths, batches) <= padded(lengths, in_turn)


def test_samples_of_one_length_keep_their_order() -> None:
    assert similar_lengths([7] * 5, 2) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(("lengths", "expected"), [([], []), ([3, 1, 2, 9, 4, 5], [[1, 0], [2, 3], [4, 5]])])
def test_between_two_powers_samples_are_sorted(lengths: list[int], expected: list[list[int]]) -> None:
    assert similar_lengths(lengths, 2) == expected
