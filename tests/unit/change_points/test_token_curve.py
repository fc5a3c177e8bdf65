"""The paper's recipe: its breaks are ruptures', its histogram is the recipe's, its peaks are not chance."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import ruptures
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from schedule_finder.change_points import AttentionShift, TokenCurve
from schedule_finder.change_points.token_curve import single_breaks
from tests.support.planted_maps import NUM_VISION, planted_maps


def binseg(curve: np.ndarray) -> int:
    """The recipe as docs/methods.md gives it: ruptures' own defaults, but for ``jump``."""
    return ruptures.Binseg(model="l2", jump=1).fit(curve).predict(n_bkps=1)[0]


@settings(max_examples=300, deadline=None)
@given(
    arrays(
        np.float64,
        st.tuples(st.integers(1, 3), st.integers(4, 40)),
        # Few values, so that ties are common; and values whose sums round.
        elements=st.sampled_from([0.0, 0.1, 0.3, 1.0]) | st.floats(1e-9, 1),  # squares of less underflow
    )
)
def test_single_breaks_are_binsegs_on_any_curve(steps: np.ndarray):
    curves = np.cumsum(steps, axis=1)
    assert single_breaks(curves).tolist() == [binseg(curve) for curve in curves]


@pytest.mark.parametrize("num_layers", [4, 5, 12, 13, 31, 32, 33])
def test_single_breaks_are_binsegs_where_breaks_tie(num_layers: int):
    """Straight ramps of an odd number of layers have two equally good breaks; rounding picks one."""
    slopes = np.random.default_rng(0).random(40)
    curves = np.outer(slopes, np.arange(1, num_layers + 1))
    curves = np.concatenate([curves, np.cumsum(np.repeat(slopes[:, None], num_layers, 1), axis=1)])
    curves = np.concatenate([curves, np.zeros((1, num_layers)), np.full((1, num_layers), 0.1)])
    assert single_breaks(curves).tolist() == [binseg(curve) for curve in curves]


def test_token_curve_histogram_is_the_recipe_written_out():
    maps = planted_maps(24, (5, 14))
    expected: Counter[int] = Counter()
    for sample in maps:
        total = sample.sum(axis=0)
        for token in sorted(range(NUM_VISION), key=lambda v: -total[v])[: NUM_VISION // 10]:
            expected[binseg(np.cumsum(sample[:, token])) - 1] += 1
    evidence = TokenCurve().detect(maps).evidence
    assert evidence.histogram == [expected[layer] for layer in range(24)]
    assert evidence.num_curves == sum(evidence.histogram) == 40


def test_token_curve_reads_a_peak_off_the_histogram_and_it_is_not_where_attention_moves():
    """The longest regime's tokens have most attention in total; their ramp over 14..23 breaks half way."""
    maps = planted_maps(24, (5, 14), num_samples=60, noise=0.2)
    found = TokenCurve().detect(maps)
    assert found.change_points == [17]
    assert int(np.argmax(found.evidence.histogram)) == 16  # the layer after which the paper prunes
    assert AttentionShift(resamples=4, simulations=50).detect(maps).change_points == [5, 14]


@pytest.mark.parametrize("num_layers", [12, 24, 33])
def test_token_curve_finds_nothing_in_a_straight_ramp_and_shows_where_it_splits(num_layers: int):
    rng = np.random.default_rng(0)
    maps = [np.tile(rng.random(60), (num_layers, 1)) for _ in range(20)]
    found = TokenCurve().detect(maps)
    evidence = found.evidence
    assert found.change_points == []
    middle = np.arange(num_layers) * np.array(evidence.straight_ramp)
    assert sum(evidence.straight_ramp) == evidence.num_curves == 120
    assert middle.sum() / 120 == pytest.approx(num_layers / 2 - 1, abs=0.5)
    if num_layers % 2 == 0:  # else two layers tie and rounding chooses, token by token
        assert evidence.histogram == evidence.straight_ramp == evidence.shuffled_layers


def test_token_curve_reads_no_peak_that_a_straight_ramp_would_have_too():
    """Equally good breaks of an odd ramp: a hair of noise that all samples share decides for one."""
    rng = np.random.default_rng(0)
    hair = 1 + 1e-6 * rng.standard_normal((25, 1))
    found = TokenCurve().detect([rng.random(60) * hair for _ in range(20)])
    histogram = np.array(found.evidence.histogram)
    assert histogram.max() == histogram.sum() == 120
    assert max(found.evidence.excess_share) > found.evidence.excess_threshold
    assert found.change_points == []


def test_token_curve_reads_no_peak_in_what_noise_alone_scatters():
    """Breaks scatter over all layers; at a 95 % level, more than 2 of 6 alarms by chance: 2e-3."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(6):
        found = TokenCurve(shuffles=50).detect([rng.exponential(size=(24, 60)) ** 3 for _ in range(40)])
        assert np.count_nonzero(found.evidence.histogram) > 15
        alarms += bool(found.change_points)
    assert alarms <= 2


def test_token_curve_counts_a_peak_only_above_the_stated_threshold():
    """A tenth of the samples break late. That is a peak by chance's measure, and by a bar of 20 % none."""
    rng = np.random.default_rng(0)
    maps = [rng.uniform(0.9, 1.1, (24, 30)) for _ in range(100)]
    for sample in maps[:10]:
        sample[:18] *= 0.05
    usual = TokenCurve().detect(maps)
    strict = TokenCurve(min_excess=0.2).detect(maps)
    late = int(np.argmax(usual.evidence.histogram[16:])) + 16
    assert usual.evidence.histogram[late] > 0
    assert usual.change_points == [late + 1]
    assert strict.change_points == []
    assert strict.evidence.excess_threshold == 0.2
