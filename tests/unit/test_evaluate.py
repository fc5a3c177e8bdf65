"""Pieces of the evaluation that need no model."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from schedule_finder.evaluation.evaluate import paired_interval, same_answer, wilson_interval


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (3, 10), (10, 10), (871, 1000), (1, 1)])
def test_wilson_interval_equals_scipy(successes: int, count: int) -> None:
    expected = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    low, high = wilson_interval(successes, count)
    assert low == pytest.approx(expected.low, abs=1e-6)
    assert high == pytest.approx(expected.high, abs=1e-6)


def test_no_answers_have_no_interval() -> None:
    assert all(math.isnan(edge) for edge in wilson_interval(0, 0))


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("Red", "red", True),
        (" the red star. ", "red star", True),
        ("red", "blue", False),
        ("", "red", False),
        ("10", "1", False),
        ("an apple", "apple", True),
    ],
)
def test_same_answer(found: str, expected: str, same: bool) -> None:
    assert same_answer(found, expected) is same


def test_a_paired_interval_is_the_bootstrap_of_the_differences() -> None:
    rng = np.random.default_rng(1)
    differences = rng.choice([-1.0, 0.0, 1.0], 300, p=[0.2, 0.7, 0.1])
    low, high = paired_interval(differences)
    means = rng.choice(differences, (4000, 300)).mean(1)
    expected = np.quantile(means, [0.025, 0.975])
    assert [low, high] == pytest.approx(expected.tolist(), abs=0.01)
    # Pairs that never differ leave no doubt.
    assert paired_interval(np.zeros(50)) == (0.0, 0.0)
