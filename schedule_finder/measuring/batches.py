"""Batches of prompts of similar length: in a batch, every prompt is padded to the longest."""

from __future__ import annotations

from collections.abc import Sequence


def similar_lengths(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Batches of at most ``size`` samples, as indices.

    The first ``size``, ``2 * size``, ``4 * size``, ... samples are whole batches, so that a measurement may begin with
    the first samples; between two of these numbers, samples are sorted by length.

    Args:
        lengths: tokens of each sample's prompt.
        size: most samples of a batch.
    """
    batches: list[list[int]] = []
    start, end = 0, size
    while start < len(lengths):
        chunk = sorted(range(start, min(end, len(lengths))), key=lambda index: lengths[index])
        batches += [chunk[first : first + size] for first in range(0, len(chunk), size)]
        start, end = end, 2 * end
    return batches
