"""What segments have in common: effect sizes between neighbours, and regimes that return."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from schedule_finder.change_points.noise_model import SMALLEST_OWN

if TYPE_CHECKING:
    from collections.abc import Sequence


def segment_numbers(breaks: Sequence[int], num_layers: int) -> np.ndarray:
    """Number of each layer's segment, ``[num_layers]``."""
    return np.searchsorted(np.asarray(breaks, dtype=int), np.arange(num_layers), side="right")


def effect_size(distance: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """Distance between two groups of layers over the mean distance of two layers of one group.

    The former is `unbiased_distance`, the squared maximum mean discrepancy: mean distance across the groups, less
    the mean distance within them, over pairs of different layers.
    """
    within = (_mean_within(distance, first) + _mean_within(distance, second)) / 2
    return unbiased_distance(distance, first, second) / max(within, 2 * SMALLEST_OWN)


def unbiased_distance(distance: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """Distance between the means of two groups of layers, nats; 0 is expected where they have the same mean."""
    within = (_mean_within(distance, first) + _mean_within(distance, second)) / 2
    return float(distance[np.ix_(first, second)].mean() - within)


def cluster_segments(
    distance: np.ndarray, own: np.ndarray, breaks: Sequence[int], penalty: float
) -> list[int]:
    """Cluster of each segment, numbered in order of first use.

    Segments are joined, the most alike first, as long as joining them costs less than ``penalty``: what one change
    has to gain. Neighbours are never joined, as a change between them was found.
    """
    number = segment_numbers(breaks, len(distance))
    groups = [[segment] for segment in range(len(breaks) + 1)]

    def cost(members: list[int]) -> float:
        layers = np.flatnonzero(np.isin(number, members))
        weight = 1 / own[layers]
        return float(weight @ distance[np.ix_(layers, layers)] @ weight / 2 / weight.sum())

    while True:
        best: tuple[float, int, int] | None = None
        for j in range(len(groups)):
            for i in range(j):
                if any(abs(a - b) == 1 for a in groups[i] for b in groups[j]):
                    continue
                gain = cost(groups[i] + groups[j]) - cost(groups[i]) - cost(groups[j])
                if gain < penalty and (best is None or gain < best[0]):
                    best = gain, i, j
        if best is None:
            break
        groups[best[1]] += groups.pop(best[2])
    cluster = {segment: min(group) for group in groups for segment in group}
    order = sorted(set(cluster.values()))
    return [order.index(cluster[segment]) for segment in range(len(breaks) + 1)]


def _mean_within(distance: np.ndarray, layers: np.ndarray) -> float:
    if len(layers) < 2:
        return 0.0
    return float(distance[np.ix_(layers, layers)].sum() / (len(layers) * (len(layers) - 1)))
