"""Random planted backbones: one condition of noise, random depth, regimes and isolated layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.support.planted import MAX_GROUPS, PlantedBackbone, planted_llava

if TYPE_CHECKING:
    from collections.abc import Sequence

MIN_REGIME = 3
"""Layers of a regime that are not isolated."""


@dataclass(frozen=True)
class Condition:
    """How noisy the planted layers are.

    Attributes:
        noise: lowest and highest standard deviation of a layer's noise, nats.
        growing: whether it grows over depth; else every layer draws its own, log-uniformly.
        drift, tails, correlation: as of `planted_llava`.
    """

    noise: tuple[float, float]
    growing: bool = False
    drift: float = 0.0
    tails: float | None = None
    correlation: float = 0.0

    def levels(self, num_layers: int, rng: np.random.Generator) -> np.ndarray:
        """Noise of each layer, ``[num_layers]``, nats."""
        low, high = self.noise
        if low == high:
            return np.full(num_layers, low)
        if self.growing:
            return np.linspace(low, high, num_layers)
        return np.exp(rng.uniform(np.log(low), np.log(high), num_layers))


CONDITIONS: dict[str, Condition] = {
    "noise 0.5": Condition((0.5, 0.5)),
    "noise 1": Condition((1.0, 1.0)),
    "noise 0.3-2, by layer": Condition((0.3, 2.0)),
    "noise 0.3-2, growing": Condition((0.3, 2.0), growing=True),
    "noise 2": Condition((2.0, 2.0)),
    "noise 1, heavy tails": Condition((1.0, 1.0), tails=3.0),
    "noise 1, correlated 0.5": Condition((1.0, 1.0), correlation=0.5),
    "drift 0.15": Condition((0.0, 0.0), drift=0.15),
    "noise 0.5, drift 0.15": Condition((0.5, 0.5), drift=0.15),
    "drift 0.3": Condition((0.0, 0.0), drift=0.3),
}


@dataclass(frozen=True)
class Truth:
    """Where attention moves in a planted backbone."""

    num_layers: int
    boundaries: tuple[int, ...]
    groups: tuple[int, ...]
    isolated: tuple[int, ...]


def random_truth(rng: np.random.Generator, *, shifts: bool, layers: tuple[int, int] = (12, 80)) -> Truth:
    """Draw a depth (log-uniformly), 1 to 4 boundaries and 0 to 3 isolated layers; without ``shifts``, none.

    Every regime has at least `MIN_REGIME` layers besides isolated ones, and from three regimes on one returns
    in half of the cases. Isolated layers are neither the first, nor the last, nor neighbours.
    """
    num_layers = round(float(np.exp(rng.uniform(*np.log(layers)))))
    if not shifts:
        return Truth(num_layers, (), (0,), ())
    while True:
        count = int(rng.integers(1, min(4, num_layers // (MIN_REGIME + 1) - 1) + 1))
        boundaries = np.sort(rng.choice(np.arange(1, num_layers), count, replace=False))
        number = int(rng.integers(0, 4))
        isolated = np.sort(rng.choice(np.arange(1, num_layers - 1), number, replace=False))
        regular = np.delete(np.arange(num_layers), isolated)
        sizes = np.bincount(np.searchsorted(boundaries, regular, side="right"), minlength=count + 1)
        groups = _groups(count + 1, rng)
        fits = max(groups) + 1 + number + 1 <= MAX_GROUPS
        if fits and sizes.min() >= MIN_REGIME and (np.diff(isolated) > 1).all():
            return Truth(num_layers, *(tuple(map(int, x)) for x in (boundaries, groups, isolated)))


def _groups(regimes: int, rng: np.random.Generator) -> list[int]:
    """The group of each regime; neighbours differ."""
    groups = list(range(regimes))
    if regimes >= 3 and rng.random() < 0.5:
        back = int(rng.integers(2, regimes))
        groups[back] = int(rng.integers(0, back - 1))
        groups[back + 1 :] = [group - 1 for group in groups[back + 1 :]]
    return groups


def plant(truth: Truth, condition: Condition, seed: int) -> PlantedBackbone:
    """The backbone of a truth under a condition."""
    rng = np.random.default_rng([seed, 2])
    return planted_llava(
        truth.num_layers,
        truth.boundaries,
        condition.levels(truth.num_layers, rng).tolist(),
        seed,
        isolated=truth.isolated,
        groups=truth.groups,
        drift=condition.drift,
        tails=condition.tails,
        correlation=condition.correlation,
    )


def same_boundaries(found: Sequence[int], truth: Truth) -> bool:
    """Whether every boundary was found within one layer, and no other.

    Where isolated layers stand at a boundary, the new regime begins before or after them alike.
    """
    if len(found) != len(truth.boundaries):
        return False
    pairs = zip(sorted(found), truth.boundaries, strict=True)
    return all(any(abs(f - b) <= 1 for b in _places(boundary, truth.isolated)) for f, boundary in pairs)


def _places(boundary: int, isolated: Sequence[int]) -> list[int]:
    places = [boundary]
    if boundary in isolated:
        places.append(boundary + 1)
    if boundary - 1 in isolated:
        places.append(boundary - 1)
    return places
