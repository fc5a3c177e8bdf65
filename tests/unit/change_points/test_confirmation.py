"""Whether changes are abrupt, and more than noise of another size makes."""

from __future__ import annotations

import numpy as np
import pytest

from schedule_finder.change_points.confirmation import NEAR, abruptness, gain_beside_noise
from schedule_finder.change_points.noise_model import NoiseModel

SIZE, MIDDLE = 24, 12
NO_NOISE = np.full(SIZE, 1e-9)


def squared_distances(signal: np.ndarray) -> np.ndarray:
    return ((signal[:, None] - signal[None]) ** 2).sum(axis=-1)


def test_a_step_is_abrupt_and_a_trend_is_not() -> None:
    layer = np.arange(SIZE)
    step = squared_distances((layer >= MIDDLE)[:, None].astype(float))
    trend = squared_distances(layer[:, None] / SIZE)
    assert abruptness(step, NO_NOISE, 0, MIDDLE, SIZE) == pytest.approx(1.0)
    # Means of n layers on either side are n steps apart.
    assert abruptness(trend, NO_NOISE, 0, MIDDLE, SIZE) == pytest.approx((NEAR / MIDDLE) ** 2)


def test_a_random_walk_is_rarely_abrupt() -> None:
    rng = np.random.default_rng(0)
    walks = [np.cumsum(rng.standard_normal((80, 10)), axis=0) for _ in range(200)]
    shares = [abruptness(squared_distances(walk), np.full(80, 1e-9), 0, 40, 80) for walk in walks]
    assert np.median(shares) < 0.35


def test_an_isolated_layer_near_a_change_hardly_counts() -> None:
    signal = np.zeros((SIZE, 3))
    signal[MIDDLE:, 0] = 1.0
    signal[MIDDLE + 1, 2] = 5.0
    own = np.full(SIZE, 0.05)
    own[MIDDLE + 1] = 25.0
    assert abruptness(squared_distances(signal), own, 0, MIDDLE, SIZE) > 0.9


def test_a_mean_that_follows_the_noise_gains_nothing_and_a_step_keeps_its_gain() -> None:
    amplitude = np.linspace(0.3, 2.0, SIZE)
    model = NoiseModel(np.full(SIZE, 0.1), 0.0, 5)
    follows = squared_distances(amplitude[:, None])
    assert gain_beside_noise(follows, model, amplitude, 0, MIDDLE, SIZE) == pytest.approx(0.0, abs=1e-9)
    uneven = np.tile([0.3, 2.0], SIZE // 2)
    assert gain_beside_noise(follows, model, uneven, 0, MIDDLE, SIZE) > 1.0
    step = squared_distances((np.arange(SIZE) >= MIDDLE)[:, None].astype(float))
    # Twelve layers on either side, each with the variance 0.1.
    assert gain_beside_noise(step, model, uneven, 0, MIDDLE, SIZE) == pytest.approx(60.0, rel=1e-6)
