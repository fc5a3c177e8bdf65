"""Segments of layers by penalised cost: kernel change-point detection on distances. The only import of ruptures.

The cost of a segment is the generalised least-squares residual about the segment's mean under the covariance of
the noise model (`noise_model`): kernel change-point detection (Arlot, Celisse and Harchaoui 2019; Garreau and Arlot
2018) whose feature space is whitened. Only distances enter: with ``W`` the whitening projection, whose rows sum to
0, the residual is ``-1/2 sum(W * B)``. Under the model without a change its expectation is the segment's length
less one, and differing noise levels and drift favour no split.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import ruptures
from ruptures.base import BaseCost

if TYPE_CHECKING:
    from schedule_finder.change_points.noise_model import NoiseModel

MIN_SIZE = 2
"""Layers of a regime. One layer alone is no regime but an isolated layer; ruptures' Binseg, and so the paper's
recipe, has the same minimum."""
MOST_BREAKS = 5
"""Breaks that are tried for the penalty; the first break is the one that matters, and more never change it."""


def mean_costs(distances: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Costs of all segments without drift: weighted sums of squares about weighted means.

    Args:
        distances: ``[n, size, size]``, nats.
        own: own part of each layer ``[n, size]``, nats; a layer weighs ``1 / own``.

    Returns:
        ``[n, size + 1, size + 1]``, entry ``[i, start, end]``; infinity for segments shorter than `MIN_SIZE`.
    """
    number, size = own.shape
    weight = 1 / own
    total = np.zeros((number, size + 1, size + 1))
    total[:, 1:, 1:] = (weight[:, :, None] * weight[:, None] * distances).cumsum(1).cumsum(2)
    weights = np.zeros((number, size + 1))
    weights[:, 1:] = weight.cumsum(1)
    start, end = np.triu_indices(size + 1, MIN_SIZE)
    block = total[:, end, end] - total[:, start, end] - total[:, end, start] + total[:, start, start]
    tables = np.full((number, size + 1, size + 1), np.inf)
    tables[:, start, end] = block / 2 / (weights[:, end] - weights[:, start])
    return tables


@dataclass(frozen=True)
class SegmentCosts:
    """Costs of all segments under one noise model."""

    model: NoiseModel

    @cached_property
    def _segments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Starts, ends, whitening weights ``[segments, pairs]`` and log-determinants of all segments."""
        size = len(self.model.own)
        position = np.zeros((size, size), dtype=int)
        upper = np.triu_indices(size, 1)
        position[upper] = np.arange(len(upper[0]))
        starts, ends, weights, logs = [], [], [], []
        for length in range(MIN_SIZE, size + 1):
            start = np.arange(size - length + 1)
            covariance = self.model.covariance(start, length)
            inverse = np.linalg.inv(covariance)
            row = inverse.sum(axis=2)
            whitening = inverse - row[:, :, None] * row[:, None] / row.sum(axis=1)[:, None, None]
            i, j = np.triu_indices(length, 1)
            part = np.zeros((len(start), len(upper[0])), dtype=np.float32)
            part[
                np.arange(len(start))[:, None], position[start[:, None] + i, start[:, None] + j]
            ] = -whitening[:, i, j]
            starts.append(start)
            ends.append(start + length)
            weights.append(part)
            logs.append(np.linalg.slogdet(covariance)[1])
        return np.concatenate(starts), np.concatenate(ends), np.concatenate(weights), np.concatenate(logs)

    def tables(self, distances: np.ndarray) -> np.ndarray:
        """Costs ``[n, size + 1, size + 1]``, entry ``[i, start, end]``, of ``distances`` ``[n, size, size]``.

        Segments shorter than `MIN_SIZE` cost infinity.
        """
        size = distances.shape[1]
        starts, ends, weights, _ = self._segments
        upper = np.triu_indices(size, 1)
        tables = np.full((len(distances), size + 1, size + 1), np.inf)
        tables[:, starts, ends] = distances[:, upper[0], upper[1]].astype(np.float32) @ weights.T
        return tables

    def log_determinant(self, breaks: list[int]) -> float:
        """Sum over the segments between ``breaks`` of the log-determinants of their covariances."""
        starts, ends, _, logs = self._segments
        of_segment = dict(zip(zip(starts.tolist(), ends.tolist(), strict=True), logs.tolist(), strict=True))
        bounds = [0, *breaks, len(self.model.own)]
        return float(sum(of_segment[pair] for pair in itertools.pairwise(bounds)))


def total_cost(table: np.ndarray, breaks: list[int]) -> float:
    """Cost of the segments between ``breaks``."""
    bounds = [0, *breaks, len(table) - 1]
    return float(sum(table[a, b] for a, b in itertools.pairwise(bounds)))


def breaking_penalty(tables: np.ndarray) -> np.ndarray:
    """The penalty per break at which each table's best segmentation gets its first break, ``[n]``."""
    size = tables.shape[1] - 1
    best = tables[:, 0, :]
    penalty = np.full(len(tables), -np.inf)
    for count in range(1, min(MOST_BREAKS, size // MIN_SIZE - 1) + 1):
        longer = np.full_like(best, np.inf)
        for end in range((count + 1) * MIN_SIZE, size + 1):
            longer[:, end] = (best[:, :end] + tables[:, :end, end]).min(axis=1)
        best = longer
        penalty = np.maximum(penalty, (tables[:, 0, size] - best[:, size]) / count)
    return penalty


class _TableCost(BaseCost):  # type: ignore[misc]  # ruptures is not typed
    """Costs looked up in a table. ruptures ignores a custom cost that is no ``BaseCost``."""

    model = "table"
    min_size = MIN_SIZE

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self.signal = table[1:]

    def fit(self, signal: np.ndarray) -> _TableCost:
        return self

    def error(self, start: int, end: int) -> float:
        return float(self.table[start, end])


def segment(table: np.ndarray, penalty: float) -> list[int]:
    """First layers of all segments but the first, of the cheapest segmentation at ``penalty`` per break; exact."""
    search = ruptures.Pelt(custom_cost=_TableCost(table), min_size=MIN_SIZE, jump=1)
    return [int(b) for b in search.fit(table[1:]).predict(pen=penalty)[:-1]]  # the last is the end


def segment_all(tables: np.ndarray, penalty: float) -> list[list[int]]:
    """`segment` of many tables ``[n, size + 1, size + 1]`` at once, by dynamic programming over segment ends."""
    number, size = len(tables), tables.shape[1] - 1
    best = np.full((number, size + 1), np.inf)
    best[:, 0] = -penalty
    origin = np.zeros((number, size + 1), dtype=int)
    for end in range(MIN_SIZE, size + 1):
        totals = best[:, :end] + tables[:, :end, end] + penalty
        origin[:, end] = totals.argmin(axis=1)
        best[:, end] = totals[np.arange(number), origin[:, end]]
    breaks = []
    for row in origin:
        found = [int(row[size])]
        while found[-1] > 0:
            found.append(int(row[found[-1]]))
        breaks.append(found[-2::-1] if len(found) > 1 else [])
    return breaks
