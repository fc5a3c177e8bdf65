"""How large a change would be by chance: order the layers anew.

Without a change or drift the layers of a regime can be exchanged, whatever their noise levels and the distribution of
the noise. So what the segmentation finds in shuffled layers is what it finds by chance, with own parts estimated
anew in every shuffle. Two more orders of the layers guard against what exchange alone does not cover: shuffles of
blocks of neighbours keep the correlation between neighbours, and simulated profiles keep noisy layers together.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from schedule_finder.change_points.noise_model import NoiseModel, estimate_dimensions, estimate_own
from schedule_finder.change_points.segmentation import (
    MIN_SIZE,
    breaking_penalty,
    mean_costs,
    segment,
)

BLOCK = 3
"""Layers that stay together in the second kind of shuffle; a correlation of .5 between neighbours is then .1."""


@dataclass(frozen=True)
class TestedBreak:
    """A break with the penalty that it exceeded."""

    layer: int
    penalty: float


@dataclass(frozen=True)
class ChanceLevels:
    """Penalties that no break exceeds by chance.

    Attributes:
        penalty: per break.
        gate: at which something must still break for any change to be accepted.
        simulated: of the simulated profiles alone.
    """

    penalty: float
    gate: float
    simulated: float


def chance_levels(distance: np.ndarray, number: int, level: float, seed: int) -> ChanceLevels:
    """Quantile ``level`` of the breaking penalties of shuffled and simulated layers.

    Args:
        distance: mean distances ``[num_layers, num_layers]``, nats.
        number: shuffles of each kind, and simulations.
        level: in (0, 1).
        seed: draws them.
    """
    rng = np.random.default_rng(seed)
    size = len(distance)
    orders = [rng.permutation(size) for _ in range(number)] + [
        _shuffle_blocks(size, rng) for _ in range(number)
    ]
    index = np.array(orders)
    shuffled = _breaking(distance[index[:, :, None], index[:, None]])
    model = NoiseModel(estimate_own(distance[None])[0], 0.0, estimate_dimensions(distance))
    simulated = float(np.quantile(_breaking(model.simulate(number, seed)), level))
    single, blocks = (float(np.quantile(part, level)) for part in (shuffled[:number], shuffled[number:]))
    penalty = max(single, simulated)
    return ChanceLevels(penalty, max(penalty, blocks), simulated)


def tested_breaks(distance: np.ndarray, number: int, level: float, seed: int) -> list[TestedBreak]:
    """Breaks that exceed chance, by repeated segmentation: first of all layers, then within each part.

    Every part is tested against shuffles of its own layers, so the changes found before do not count as noise.
    """
    return sorted(_tested(distance, 0, number, level, seed), key=lambda one: one.layer)


def _tested(distance: np.ndarray, first: int, number: int, level: float, seed: int) -> list[TestedBreak]:
    size = len(distance)
    if size < 2 * MIN_SIZE:
        return []
    table = mean_costs(distance[None], estimate_own(distance[None]))[0]
    levels = chance_levels(distance, number, level, seed)
    if breaking_penalty(table[None])[0] <= levels.gate:
        return []
    breaks = segment(table, levels.penalty)
    found = [TestedBreak(first + b, levels.penalty) for b in breaks]
    bounds = [0, *breaks, size]
    for start, end in itertools.pairwise(bounds):
        found += _tested(distance[start:end, start:end], first + start, number, level, seed)
    return found


def _breaking(distances: np.ndarray) -> np.ndarray:
    return breaking_penalty(mean_costs(distances, estimate_own(distances)))


def _shuffle_blocks(size: int, rng: np.random.Generator) -> np.ndarray:
    edges = np.unique(np.r_[0, np.arange(rng.integers(0, BLOCK), size, BLOCK), size])
    blocks = [np.arange(a, b) for a, b in itertools.pairwise(edges)]
    return np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])
