"""How far two layers of one regime are apart: each layer's own part, and drift.

Model of the mean distance (`distances`) of layers ``l < m`` in regimes ``r(l)`` and ``r(m)``:

    B[l, m] = own[l] + own[m] + drift * (m - l) + between[r(l), r(m)] + error

``own`` is what no other layer shares: noise of the layer's weights, and what is particular to the layer. It is
additive for logarithmic affinities and differs by layer. ``drift`` is a random walk of the attention logits.
``error`` is chance alignment of the own parts of two layers, which is small where they have many directions to
differ in (``dimensions``), and the sampling error of the mean over samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SMALLEST_OWN = 0.0025
"""Nats. Two layers this far from their regime have a squared Hellinger distance of .005: too small to matter for
which tokens are kept, and of the order of what float16 scores leave. No own part is taken as less."""
NEIGHBOURS = 3
"""Layers on either side from which a layer's own part is estimated: nine pairs, whose median survives two isolated
neighbours."""
MOST_DIMENSIONS = 20
"""More effective dimensions change the penalty by less than a tenth and cannot be told from 30 layers."""


@dataclass(frozen=True)
class NoiseModel:
    """``own`` ``[num_layers]`` and ``drift`` in nats, and the effective ``dimensions`` of the differences."""

    own: np.ndarray
    drift: float
    dimensions: int

    def covariance(self, start: np.ndarray, length: int) -> np.ndarray:
        """Covariances of the layers ``start .. start + length - 1``, ``[len(start), length, length]``."""
        index = start[:, None] + np.arange(length)
        walk = self.drift * np.minimum.outer(np.arange(length), np.arange(length))
        return walk + self.own[index][:, :, None] * np.eye(length)

    def simulate(self, number: int, seed: int) -> np.ndarray:
        """Distances of profiles without a change, ``[number, num_layers, num_layers]``."""
        rng = np.random.default_rng(seed)
        shape = (number, len(self.own), self.dimensions)
        noise = np.sqrt(self.own)[:, None] * rng.standard_normal(shape)
        walk = np.cumsum(np.sqrt(self.drift) * rng.standard_normal(shape), axis=1)
        signal = (noise + walk) / np.sqrt(self.dimensions)
        gram = signal @ signal.transpose(0, 2, 1)
        energy = np.einsum("nll->nl", gram)
        return energy[:, :, None] + energy[:, None] - 2 * gram


def estimate_own(distances: np.ndarray) -> np.ndarray:
    """Each layer's own part as segmentation weighs it, ``[n, num_layers]``; arguments of `raw_own`.

    A layer with less than the median own part counts as the median layer: weights that rest on one small estimate
    would make its neighbours look noisy.
    """
    own = raw_own(distances)
    return np.maximum(own, np.median(own, axis=1, keepdims=True))


def raw_own(distances: np.ndarray) -> np.ndarray:
    """Each layer's own part, ``[n, num_layers]``, from distances ``[n, num_layers, num_layers]``.

    For ``i < l < k`` half of ``B[i, l] + B[l, k] - B[i, k]`` has the expectation ``own[l]``, whatever the drift and
    with a change on either side of ``l``; the median over pairs near ``l`` is taken. The first and the last layer
    have neighbours on one side only. The least is `SMALLEST_OWN`.
    """
    number, num_layers = distances.shape[:2]
    own = np.empty((number, num_layers))
    for layer in range(num_layers):
        before = np.arange(max(0, layer - NEIGHBOURS), layer)
        after = np.arange(layer + 1, min(num_layers, layer + NEIGHBOURS + 1))
        near = np.r_[before, after]
        row = distances[:, layer, near]
        pairs = (row[:, :, None] + row[:, None] - distances[:, near[:, None], near]) / 2
        if len(before) and len(after):
            values = pairs[:, : len(before), len(before) :].reshape(number, -1)
        else:
            values = pairs[:, *np.triu_indices(len(near), 1)]
        own[:, layer] = np.median(values, axis=1)
    return np.maximum(own, SMALLEST_OWN)


def estimate_dimensions(distance: np.ndarray) -> int:
    """Effective dimensions in which layers differ.

    Two independent directions in ``d`` dimensions have the mean squared cosine ``1 / d``. Steps from one layer to
    the next that share no layer are compared; what changes of regime have in common makes ``d`` smaller and the
    penalty larger.
    """
    product = (distance[1:, :-1] + distance[:-1, 1:] - distance[1:, 1:] - distance[:-1, :-1]) / 2
    norm = np.sqrt(np.maximum(np.diag(distance, 1), 1e-9))
    cosine = (product / np.outer(norm, norm))[np.triu_indices(len(product), 2)]
    if not len(cosine):
        return 1
    return int(np.clip(1 / max(float(np.mean(cosine**2)), 1e-3), 1, MOST_DIMENSIONS))


SMALLEST_DRIFT = 1e-4
"""Nats per layer, the least that is tried: eighty layers then drift as far apart as one layer's smallest own part
allows, three times over."""


def largest_drift(distance: np.ndarray, own: np.ndarray) -> float:
    """An upper estimate of the drift per layer, nats.

    The unbiased squared distance (MMD) of the two layers before a gap from the two after it has the expectation
    ``2 * drift`` where nothing changes; its median over gaps, weighted by the layers' noise, is taken. Changes at
    many gaps, and isolated layers, make it too large.
    """
    gap = np.arange(2, len(distance) - 1)
    if not len(gap):
        return SMALLEST_DRIFT
    across = sum(distance[gap - i, gap + j] for i in (1, 2) for j in (0, 1)) / 2
    mmd = across - distance[gap - 2, gap - 1] - distance[gap, gap + 1]
    weight = 1 / (own[gap - 2] + own[gap - 1] + own[gap] + own[gap + 1])
    order = np.argsort(mmd)
    total = np.cumsum(weight[order])
    return max(float(mmd[order][np.searchsorted(total, total[-1] / 2)]) / 2, SMALLEST_DRIFT)
