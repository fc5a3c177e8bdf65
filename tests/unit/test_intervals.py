"""Intervals: coverage, agreement with scipy, reproducibility."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from schedule_finder.intervals import band, mean_interval, wilson_interval


def test_band_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    # 400 independent points in one call: a 90 % band that truly covers 88 % strays out of
    # [0.82, 0.95] with probability below 1e-3.
    found = band(rng.exponential(1.0, (60, 400)), level=0.9)
    covered = np.mean((found.low <= 1.0) & (found.high >= 1.0))
    assert 0.82 < covered < 0.95


def test_band_is_about_samples_reproducible_and_skips_unknown_values():
    values = np.random.default_rng(0).normal(size=(50, 2))
    values[0, 1] = np.nan
    found = band(values, seed=3)
    assert found.mean == pytest.approx([values[:, 0].mean(), values[1:, 1].mean()])
    assert (found.low < found.mean).all()
    assert (found.mean < found.high).all()
    again, other = band(values, seed=3), band(values, seed=4)
    assert (again.low == found.low).all()
    assert (other.low != found.low).all()
    wide = band(values[:10], seed=3)
    assert ((wide.high - wide.low) > (found.high - found.low)).all()
    alone = band(values[1:2])
    assert (alone.low == alone.high).all()


def test_band_of_a_point_that_no_sample_knows_is_unknown():
    found = band(np.array([[1.0, np.nan], [3.0, np.nan]]))
    assert found.mean == pytest.approx([2.0, np.nan], nan_ok=True)
    assert np.isnan([found.low[1], found.high[1]]).all()
    assert np.isfinite([found.low[0], found.high[0]]).all()


@pytest.mark.parametrize(
    ("values", "level", "message"),
    [(np.ones(3), 0.95, "shape"), (np.ones((0, 3)), 0.95, "shape"), (np.ones((2, 3)), 95, "level: 95")],
)
def test_band_refuses_what_it_cannot_use(values: np.ndarray, level: float, message: str):
    with pytest.raises(ValueError, match=message):
        band(values, level)


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (3, 10), (10, 10), (871, 1000), (1, 1)])
def test_wilson_interval_equals_scipy(successes: int, count: int) -> None:
    expected = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    low, high = wilson_interval(successes, count)
    assert low == pytest.approx(expected.low, abs=1e-6)
    assert high == pytest.approx(expected.high, abs=1e-6)


def test_no_answers_have_no_interval() -> None:
    assert all(math.isnan(edge) for edge in wilson_interval(0, 0))


def test_a_paired_interval_is_the_bootstrap_of_the_differences() -> None:
    rng = np.random.default_rng(1)
    differences = rng.choice([-1.0, 0.0, 1.0], 300, p=[0.2, 0.7, 0.1])
    low, high = mean_interval(differences)
    means = rng.choice(differences, (4000, 300)).mean(1)
    expected = np.quantile(means, [0.025, 0.975])
    assert [low, high] == pytest.approx(expected.tolist(), abs=0.01)
    # Pairs that never differ leave no doubt.
    assert mean_interval(np.zeros(50)) == (0.0, 0.0)


def test_an_interval_of_continuous_values_covers_the_true_mean_and_is_seeded() -> None:
    rng = np.random.default_rng(0)
    found = [mean_interval(rng.exponential(1.0, 60), level=0.9, seed=draw) for draw in range(400)]
    assert 0.82 < np.mean([low <= 1.0 <= high for low, high in found]) < 0.95
    values = rng.normal(size=30)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1) != mean_interval(values, seed=2)
