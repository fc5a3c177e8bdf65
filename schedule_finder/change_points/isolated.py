"""Layers that attend elsewhere for one layer.

Three conditions, each against the nearest layers of the same regime (its mates):

* it shares less than `SHARED` of the pattern that two mates share, or less than `SHARED` of its own pattern is
  shared. Patterns are compared as deviations from the uniform distribution ``u``: with Bhattacharyya distances
  ``B``, half of ``B[l, u] + B[m, u] - B[l, m]`` is what ``l`` and ``m`` have in common, and noise of either layer
  does not enter;
* its own part of the distance to its mates exceeds what two mates share;
* its own part is an outlier among all layers' own parts (logarithms; median and median absolute deviation).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from schedule_finder.change_points.noise_model import SMALLEST_OWN

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
    pairs: np.ndarray, to_uniform: np.ndarray, regime: np.ndarray, without: frozenset[int] = frozenset()
) -> LayerParts:
    """Compare every layer with its mates.

    Args:
        pairs: distances ``[n, num_layers, num_layers]``, nats.
        to_uniform: distances to the uniform distribution ``[n, num_layers]``, nats.
        regime: number of each layer's regime ``[num_layers]``.
        without: layers that are nobody's mate.
    """
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
        within = pairs[:, mates[i], mates[j]].mean(axis=1)
        to_mates = pairs[:, layer, mates].mean(axis=1)
        flat = to_uniform[:, mates].mean(axis=1)
        own[:, layer] = to_mates - within / 2
        pattern[:, layer] = np.maximum(flat - within / 2, 1e-9)
        shared[:, layer] = (to_uniform[:, layer] + flat - to_mates) / 2 / pattern[:, layer]
    return LayerParts(own, shared, pattern)


def is_isolated(parts: LayerParts) -> np.ndarray:
    """Which layers are isolated, ``[n, num_layers]`` of bool."""
    size = parts.own.shape[1]
    logs = np.log(np.maximum(parts.own, SMALLEST_OWN))
    middle = np.median(logs, axis=1, keepdims=True)
    spread = 1.4826 * np.median(abs(logs - middle), axis=1, keepdims=True)
    limit = middle + NormalDist().inv_cdf(1 - LEVEL / size) * np.maximum(spread, SMALLEST_SPREAD)
    elsewhere = (parts.shared < SHARED) | (parts.pattern < SHARED * (parts.pattern + parts.own))
    return elsewhere & (parts.own > parts.pattern) & (logs > limit)


def find_isolated(pairs: np.ndarray, to_uniform: np.ndarray, regime: np.ndarray) -> tuple[list[int], LayerParts]:
    """Isolated layers of one profile, and the comparison in which they are nobody's mates.

    Args: as of `layer_parts`, with ``n = 1``.
    """
    found: frozenset[int] = frozenset()
    for _ in range(4):  # an isolated mate hides others; the set settles at once or in two rounds
        parts = layer_parts(pairs, to_uniform, regime, found)
        now = frozenset(np.flatnonzero(is_isolated(parts)[0]).tolist())
        if now == found:
            break
        found = now
    return sorted(found), parts
