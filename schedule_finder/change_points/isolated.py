"""Layers that attend elsewhere for one layer.

Three conditions, each against the nearest layers of the same regime (its mates):

* it shares less than `SHARED` of the pattern that two mates share, or what it shares is less than `SHARED` of its
  own pattern. Patterns are compared as deviations from the uniform distribution ``u``: with Bhattacharyya distances
  ``B``, half of ``B[l, u] + B[m, u] - B[l, m]`` is what ``l`` and ``m`` have in common, and noise of either layer
  does not enter;
* its own part of the distance to its mates exceeds what two mates share;
* its own part is an outlier among all layers' own parts: in logarithms, above the median by as many standard
  deviations (median absolute deviation) as the largest of that many normal values seldom is.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from schedule_finder.change_points.noise_model import SMALLEST_OWN

if TYPE_CHECKING:
    from collections.abc import Collection

SHARED = 0.25
"""Between 0, which layers that attend to different tokens share, and 1, which layers that differ by noise share."""
LEVEL = 0.05
"""Chance that any of a profile's layers passes the third condition if own parts are log-normal."""
SMALLEST_SPREAD = 0.5
"""Standard deviation of the logarithm of an own part that was estimated in eight dimensions."""
MATES = 12
"""Nearest layers of the regime with which a layer is compared; fewer follow drift, more average noise."""


@dataclass(frozen=True)
class LayerParts:
    """What each layer shares with its mates and what is its own; all ``[n, num_layers]``.

    Attributes:
        own: its own part of the distance to its mates, nats.
        shared: pattern shared with its mates over the pattern that two mates share.
        pattern: pattern that two mates share, nats.
    """

    own: np.ndarray
    shared: np.ndarray
    pattern: np.ndarray


def layer_parts(
    pairs: np.ndarray,
    to_uniform: np.ndarray,
    regime: np.ndarray,
    without: Collection[int] = (),
    *,
    robust: bool = False,
) -> LayerParts:
    """Compare every layer with its mates.

    Args:
        pairs: distances ``[n, num_layers, num_layers]``, nats.
        to_uniform: distances to the uniform distribution ``[n, num_layers]``, nats.
        regime: number of each layer's regime ``[num_layers]``.
        without: layers that are nobody's mate.
        robust: take medians over mates instead of means.
    """
    average = np.median if robust else np.mean
    size = pairs.shape[1]
    own, shared, pattern = np.zeros((3, len(pairs), size))
    shared[:] = 1.0
    layers = np.arange(size)
    for layer in range(size):
        mates = layers[(regime == regime[layer]) & (layers != layer)]
        mates = np.array([mate for mate in mates if mate not in without], dtype=int)
        mates = mates[np.argsort(abs(mates - layer), kind="stable")[:MATES]]
        if len(mates) < 2:
            continue
        i, j = np.triu_indices(len(mates), 1)
        within = average(pairs[:, mates[i], mates[j]], axis=1)
        to_mates = average(pairs[:, layer, mates], axis=1)
        flat = average(to_uniform[:, mates], axis=1)
        own[:, layer] = to_mates - within / 2
        pattern[:, layer] = np.maximum(flat - within / 2, 1e-9)
        shared[:, layer] = (to_uniform[:, layer] + flat - to_mates) / 2 / pattern[:, layer]
    return LayerParts(own, shared, pattern)


def attends_elsewhere(parts: LayerParts) -> np.ndarray:
    """The first two conditions, ``[n, num_layers]`` of bool."""
    common = parts.shared * parts.pattern
    little = (parts.shared < SHARED) | (common < SHARED * (common + parts.own))
    return little & (parts.own > parts.pattern)


def is_isolated(parts: LayerParts, candidates: Collection[int]) -> np.ndarray:
    """All three conditions, ``[n, num_layers]`` of bool; ``candidates`` do not enter the spread of own parts."""
    size = parts.own.shape[1]
    logs = np.log(np.maximum(parts.own, SMALLEST_OWN))
    others = np.delete(logs, list(candidates), axis=1)
    others = others if others.shape[1] >= size / 2 else logs
    middle = np.median(others, axis=1, keepdims=True)
    spread = 1.4826 * np.median(abs(others - middle), axis=1, keepdims=True)
    limit = middle + NormalDist().inv_cdf(1 - LEVEL / size) * np.maximum(spread, SMALLEST_SPREAD)
    return attends_elsewhere(parts) & (logs > limit)


def find_candidates(pairs: np.ndarray, to_uniform: np.ndarray, regime: np.ndarray) -> list[int]:
    """Layers that meet the first two conditions against the median mate; as mates they would hide one another.

    Args: as of `layer_parts`, with ``n = 1``.
    """
    parts = layer_parts(pairs, to_uniform, regime, robust=True)
    return np.flatnonzero(attends_elsewhere(parts)[0]).tolist()


def without_majorities(found: np.ndarray, regime: np.ndarray) -> np.ndarray:
    """``found`` ``[num_layers]`` of bool without the regimes of which it is half: those have no pattern of their own."""
    few = np.bincount(regime[found], minlength=regime.max() + 1) < np.bincount(regime) / 2
    return found & few[regime]
