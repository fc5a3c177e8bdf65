"""Batches of prompts of similar length: in a batch, every prompt is padded to the longest."""

from __future__ import annotations

from collections.abc import Sequence


def similar_lengths(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Batches of at most ``most`` samples, as indices.

    Batches have the largest power of two that ``most`` allows. The first 16, 32, 64, ... samples, and every other power
    of two from that size on, are whole batches: a measurement may begin with them. Between two of these numbers, samples
    are sorted by length.

    Args:
        lengths: tokens of each sample's prompt.
        most: samples of a batch, at least 1.
    """
    size = 1 << (most.bit_length() - 1)
    batches: list[list[int]] = []
    start, end = 0, size
    while start < len(lengths):
        chunk = sorted(range(start, min(end, len(lengths))), key=lambda index: lengths[index])
        batches += [chunk[first : first + size] for first in range(0, len(chunk), size)]
        start, end = end, 2 * end
    return batches
