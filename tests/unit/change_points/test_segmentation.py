"""Costs and segmentations against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from schedule_finder.change_points.noise_model import NoiseModel, estimate_own
from schedule_finder.change_points.segmentation import (
    SegmentCosts,
    breaking_penalty,
    mean_costs,
    segment,
    segment_all,
)


def squared_distances(signal: np.ndarray) -> np.ndarray:
    return ((signal[:, None] - signal[None]) ** 2).sum(axis=-1)


def test_segmentation_is_the_cheapest_of_all() -> None:
    rng = np.random.default_rng(0)
    for trial in range(30):
        signal = rng.standard_normal((9, 2)) + 2.0 * (np.arange(9) >= rng.integers(2, 8))[:, None]
        table = np.full((10, 10), np.inf)
        for start, end in itertools.combinations(range(10), 2):
            if end - start >= 2:
                table[start, end] = signal[start:end].var(axis=0).sum() * (end - start)
        penalty = rng.uniform(0.5, 4.0)
        costs = {}
        for count in range(4):
            for breaks in itertools.combinations(range(2, 8), count):
                ends = [0, *breaks, 9]
                costs[breaks] = sum(table[a, b] for a, b in itertools.pairwise(ends)) + penalty * count
        best = list(min(costs, key=costs.__getitem__))
        assert segment(table, penalty) == best, trial
        assert segment_all(np.stack([table, table]), penalty) == [best, best]
        threshold = breaking_penalty(table[None])[0]
        assert segment(table, 1.001 * threshold) == []
        assert segment(table, 0.999 * threshold) != []


def test_costs_without_drift_are_weighted_sums_of_squares() -> None:
    rng = np.random.default_rng(1)
    signal, own = rng.standard_normal((8, 3)), rng.uniform(0.5, 2.0, 8)
    distance = squared_distances(signal)
    table = mean_costs(distance[None], own[None])[0]
    general = SegmentCosts(NoiseModel(own, 0.0, 3)).tables(distance[None])[0]
    for start, end in itertools.combinations(range(9), 2):
        if end - start < 2:
            assert table[start, end] == general[start, end] == np.inf
            continue
        weight = 1 / own[start:end, None]
        mean = (weight * signal[start:end]).sum(axis=0) / weight.sum()
        expected = (weight * (signal[start:end] - mean) ** 2).sum()
        assert table[start, end] == pytest.approx(expected, rel=1e-9)
        assert general[start, end] == pytest.approx(expected, rel=1e-4)


def test_costs_with_drift_have_one_degree_of_freedom_per_layer_but_the_first() -> None:
    """Under the model, a segment of n layers costs n - 1 on average, whatever the noise and the drift."""
    rng = np.random.default_rng(2)
    model = NoiseModel(rng.uniform(0.2, 3.0, 10), 0.7, 4)
    table = SegmentCosts(model).tables(model.simulate(4000, 0)).mean(axis=0)
    for start, end in itertools.combinations(range(11), 2):
        if end - start >= 2:
            assert table[start, end] == pytest.approx(end - start - 1, rel=0.05)


def test_own_parts_are_exact_for_additive_distances_with_drift_and_a_change() -> None:
    rng = np.random.default_rng(3)
    own, layer = rng.uniform(0.1, 0.5, 16), np.arange(16)
    distance = own[:, None] + own + 0.03 * abs(layer[:, None] - layer)
    distance += 0.4 * ((layer[:, None] < 8) != (layer < 8))
    np.fill_diagonal(distance, 0.0)
    inner = slice(1, -1)  # the ends have neighbours on one side, and carry drift
    expected = np.maximum(own, np.median(estimate_own(distance[None])[0]))
    assert estimate_own(distance[None])[0][inner] == pytest.approx(expected[inner], abs=0.02)
