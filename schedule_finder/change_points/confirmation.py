"""Two questions to every change: is it abrupt, and is it more than noise of another size?

Both are about what the noise model (`noise_model`) does not cover.

* *Drift* that is stronger in some layers than in others looks like a change between distant layers, but not between
  near ones. A change has its whole size between the layers on either side of it.
* *Noise levels* move the mean. Attention is a softmax, so noise of the logits does not only scatter layers about
  their mean distribution: the more noise, the flatter the mean. Where the noise grows with depth, early and late
  layers have different means, and neither shuffled nor simulated layers do. The gain of a change is therefore
  computed beside a regression of the layers on their noise amplitude (analysis of covariance in feature space).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from schedule_finder.change_points.noise_model import NoiseModel
from schedule_finder.change_points.segmentation import MIN_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

NEAR = 4
"""Layers on either side in which a change has to be: twice the smallest regime, so that an isolated layer among them
leaves a regime, and few enough that drift over them is small."""
ABRUPT = 0.5
"""Share of the distance between two regimes that is there between their nearest layers: 1 for a change; about
`NEAR` over the length of a regime for drift, and the square of that for a steady trend."""


def abruptness(distance: np.ndarray, own: np.ndarray, start: int, middle: int, end: int) -> float:
    """Distance between the `NEAR` layers on either side of a change over the distance between the regimes.

    The largest of three places, as the change may be one layer off.

    Args:
        distance: of every two layers, ``[num_layers, num_layers]``, nats.
        own: own part of each layer ``[num_layers]``, nats.
        start, middle, end: first layers of the two regimes and of the next one.
    """
    whole = _distance_of_means(distance, own, start, middle, end)
    near = max(
        _distance_of_means(distance, own, max(start, b - NEAR), b, min(end, b + NEAR))
        for b in _places(start, middle, end)
    )
    return near / max(whole, 1e-9)


def gain_beside_noise(
    distance: np.ndarray, model: NoiseModel, amplitude: np.ndarray, start: int, middle: int, end: int
) -> float:
    """What a change takes off the cost of ``start .. end`` if the mean may also move with the noise amplitude.

    The largest of three places, as the change may be one layer off.

    Args:
        distance: of every two layers, ``[num_layers, num_layers]``, nats.
        model: the covariance of the layers.
        amplitude: standard deviation of each layer's noise, in any unit, ``[num_layers]``.
        start, middle, end: as of `abruptness`.
    """
    size = end - start
    inverse = np.linalg.inv(model.covariance(np.array([start]), size)[0])
    block = distance[start:end, start:end]
    gains = []
    for b in _places(start, middle, end):
        later = np.arange(start, end) >= b
        design = np.stack([np.ones(size), amplitude[start:end], later.astype(float)], axis=1)
        normal = np.linalg.pinv(design.T @ inverse @ design)
        contrast = normal[2] @ design.T @ inverse  # sums to 0: only distances enter
        gains.append(float(-contrast @ block @ contrast / 2 / max(normal[2, 2], 1e-12)))
    return max(gains)


def _places(start: int, middle: int, end: int) -> Iterator[int]:
    """``middle`` and its neighbours, as far as both regimes keep `MIN_SIZE` layers."""
    return (b for b in (middle - 1, middle, middle + 1) if b - start >= MIN_SIZE and end - b >= MIN_SIZE)


def _distance_of_means(distance: np.ndarray, own: np.ndarray, start: int, middle: int, end: int) -> float:
    """Unbiased distance between two weighted means; a layer weighs ``1 / own``, so an isolated one hardly counts."""
    size = np.where(np.arange(start, end) < middle, -1.0, 1.0) / own[start:end]
    before, after = size[: middle - start], size[middle - start :]
    weight = np.concatenate([before / -before.sum(), after / after.sum()])
    block = distance[start:end, start:end]
    return float(-weight @ block @ weight / 2 - weight**2 @ own[start:end])
