"""Detectors on made-up maps whose change points are known; through real models: test_planted_recovery."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import ruptures
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from schedule_finder.change_points import (
    DEFAULT_DETECTOR,
    DETECTORS,
    DistributionShift,
    TokenCurve,
    _breaking_penalty,
    _segment,
    get_detector,
    single_breaks,
)

Maps = list[np.ndarray]
NUM_VISION = 40


def planted_maps(
    num_layers: int,
    boundaries: tuple[int, ...],
    *,
    noise: float = 0.5,
    drift: float = 0.0,
    num_samples: int = 10,
    seed: int = 0,
) -> Maps:
    """Softmax maps: 3 nats on one group of 8 tokens per regime, noise and random walk in nats."""
    rng = np.random.default_rng(seed)
    regime = np.searchsorted(boundaries, np.arange(num_layers), side="right")
    own = noise * rng.standard_normal((num_layers, NUM_VISION))  # shared by the samples, as weights are
    walk = np.cumsum(drift * rng.standard_normal((num_layers, NUM_VISION)), axis=0)
    maps = []
    for _ in range(num_samples):
        group = rng.permutation(NUM_VISION) % (len(boundaries) + 2)
        logits = 3.0 * (group == regime[:, None]) + own + walk
        logits += 0.3 * noise * rng.standard_normal(logits.shape)
        mass = np.exp(logits)
        maps.append(rng.uniform(0.2, 0.9) * mass / mass.sum(axis=1, keepdims=True))
    return maps


def shift(maps: Maps) -> list[int]:
    return DistributionShift(resamples=1).detect(maps).change_points  # they feed the evidence only


# --- the paper's recipe ------------------------------------------------------------------------


def binseg(curve: np.ndarray) -> int:
    """The recipe as METHODS.md gives it: ruptures' own defaults, but for ``jump``."""
    return ruptures.Binseg(model="l2", jump=1).fit(curve).predict(n_bkps=1)[0]


@settings(max_examples=300, deadline=None)
@given(
    arrays(
        np.float64,
        st.tuples(st.integers(1, 3), st.integers(4, 40)),
        # Few values, so that ties are common; and values whose sums round.
        elements=st.sampled_from([0.0, 0.1, 0.3, 1.0]) | st.floats(0, 1, allow_subnormal=False),
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
    assert evidence["histogram"] == [expected[layer] for layer in range(24)]
    assert evidence["num_curves"] == sum(evidence["histogram"]) == 40


def test_token_curve_reads_a_peak_off_the_histogram_and_it_is_not_where_attention_moves():
    """The longest regime's tokens have most attention in total; their ramp over 14..23 breaks half way."""
    maps = planted_maps(24, (5, 14), num_samples=60, noise=0.2)
    found = TokenCurve().detect(maps)
    assert found.change_points == [17]
    assert int(np.argmax(found.evidence["histogram"])) == 16  # the layer after which the paper prunes
    assert shift(maps) == [5, 14]


@pytest.mark.parametrize("num_layers", [12, 24, 33])
def test_token_curve_finds_nothing_in_a_straight_ramp_and_shows_where_it_splits(num_layers: int):
    rng = np.random.default_rng(0)
    maps = [np.tile(rng.random(60), (num_layers, 1)) for _ in range(20)]
    found = TokenCurve().detect(maps)
    evidence = found.evidence
    assert found.change_points == []
    middle = np.arange(num_layers) * np.array(evidence["straight_ramp"])
    assert sum(evidence["straight_ramp"]) == evidence["num_curves"] == 120
    assert middle.sum() / 120 == pytest.approx(num_layers / 2 - 1, abs=0.5)
    if num_layers % 2 == 0:  # else two layers tie and rounding chooses, token by token
        assert evidence["histogram"] == evidence["straight_ramp"] == evidence["shuffled_layers"]


def test_token_curve_reads_no_peak_that_a_straight_ramp_would_have_too():
    """Equally good breaks of an odd ramp: a hair of noise that all samples share decides for one."""
    rng = np.random.default_rng(0)
    hair = 1 + 1e-6 * rng.standard_normal((25, 1))
    found = TokenCurve().detect([rng.random(60) * hair for _ in range(20)])
    histogram = np.array(found.evidence["histogram"])
    assert histogram.max() == histogram.sum() == 120
    assert max(found.evidence["excess_share"]) > found.evidence["excess_threshold"]
    assert found.change_points == []


def test_token_curve_reads_no_peak_in_what_noise_alone_scatters():
    """Breaks scatter over all layers; at a 95 % level, more than 2 of 6 alarms by chance: 2e-3."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(6):
        found = TokenCurve(shuffles=50).detect([rng.exponential(size=(24, 60)) ** 3 for _ in range(40)])
        assert np.count_nonzero(found.evidence["histogram"]) > 15
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
    late = int(np.argmax(usual.evidence["histogram"][16:])) + 16
    assert usual.evidence["histogram"][late] > 0
    assert usual.change_points == [late + 1]
    assert strict.change_points == []
    assert strict.evidence["excess_threshold"] == 0.2


# --- attention_shift ------------------------------------------------------------------------


@pytest.mark.parametrize("boundaries", [(2,), (7, 18), (3, 9, 17), (4, 8, 13, 22), (26,)])
def test_shifts_without_noise_are_found_exactly(boundaries: tuple[int, ...]):
    assert shift(planted_maps(28, boundaries, noise=0.0)) == list(boundaries)


def test_shifts_in_noise_are_found_within_a_layer():
    missed = []
    for seed in range(15):
        boundaries = ((6, 13), (4, 15), (5, 9, 17))[seed % 3]
        found = shift(planted_maps(22, boundaries, noise=1.0, seed=seed))
        if len(found) != len(boundaries) or np.abs(np.subtract(found, boundaries)).max() > 1:
            missed.append((seed, boundaries, found))
    assert len(missed) <= 1, missed


@pytest.mark.parametrize(("noise", "drift"), [(0.3, 0.0), (1.0, 0.0), (2.0, 0.0), (0.0, 0.3), (0.5, 0.3)])
def test_noise_and_drift_alone_are_no_shift(noise: float, drift: float):
    """At the 99 % level, more than 2 of 20 false alarms by chance: 1e-3."""
    found = [shift(planted_maps(20, (), noise=noise, drift=drift, seed=s, num_samples=6)) for s in range(20)]
    assert sum(map(bool, found)) <= 2, found


def test_drift_would_be_cut_up_by_a_cost_that_does_not_know_it():
    """Guards the drift term: plain l2 segmentation of the same profile sees shifts in a random walk."""
    maps = planted_maps(24, (), noise=0.0, drift=0.3)
    roots = np.concatenate([np.sqrt(m / m.sum(axis=1, keepdims=True)) for m in maps], axis=1)
    noise = np.median(np.sum(np.diff(roots, axis=0) ** 2, axis=1)) / 2
    plain = ruptures.KernelCPD(kernel="linear", min_size=2, jump=1).fit(roots)
    assert len(plain.predict(pen=4 * noise)) > 2
    found = DistributionShift().detect(maps)
    assert found.change_points == []
    assert found.evidence["drift"] > found.evidence["noise"] > 0


def test_a_constant_profile_has_no_change_point():
    rng = np.random.default_rng(0)
    maps = [np.tile(rng.random(30), (16, 1)) * rng.uniform(0.1, 1.0, (16, 1)) for _ in range(5)]
    assert shift(maps) == []
    assert shift(maps[:1]) == []


def test_only_the_distribution_counts_not_its_mass_nor_the_order_of_samples_and_tokens():
    rng = np.random.default_rng(0)
    maps = planted_maps(20, (6, 13), noise=1.0)
    other = [m[:, rng.permutation(NUM_VISION)] * rng.uniform(0.1, 1.0, (20, 1)) for m in reversed(maps)]
    first, second = (DistributionShift(resamples=1).detect(m) for m in (maps, other))
    assert first.change_points == second.change_points == [6, 13]
    assert first.evidence["gain"] == pytest.approx(second.evidence["gain"], rel=1e-6)


def test_layers_that_no_sample_hears_are_left_out_and_numbers_stay_the_backbones():
    maps = planted_maps(24, (5, 14))
    for sample in maps:
        sample[[1, 5, 9, 23]] = 0.0
    found = DistributionShift().detect(maps)
    assert found.change_points == [6, 14]  # 5 is silent: the new regime is first seen in 6
    assert found.evidence["layers"] == [layer for layer in range(24) if layer not in (1, 5, 9, 23)]


def test_a_layer_missing_in_some_samples_is_no_change():
    maps = planted_maps(24, (12,), num_samples=10)
    for sample in maps[:6]:
        sample[[0, 1, 6, 7, 20]] = 0.0
    maps.append(np.zeros((24, 9)))  # a sample that gave vision nothing at all
    assert shift(maps) == [12]


def test_support_is_the_share_of_resamples_that_still_find_it():
    steady, moving = planted_maps(20, (), noise=0.1, num_samples=9), planted_maps(20, (10,), noise=0.1)
    everyone = DistributionShift().detect(moving)
    # One sample of ten moves. A resample is without it in 0.9 ** 10 = 35 % of cases.
    one = DistributionShift(resamples=400).detect([*steady, moving[0]])
    assert everyone.change_points == one.change_points == [10]
    assert everyone.evidence["support"] == [1.0]
    assert one.evidence["support"][0] == pytest.approx(1 - 0.9**10, abs=0.1)


def test_evidence_explains_the_change_points():
    evidence = DistributionShift().detect(planted_maps(24, (5, 14), noise=0.5, drift=0.3)).evidence
    bands = evidence["shift"]
    mean, low, high = (np.array(bands[key]) for key in ("mean", "low", "high"))
    assert len(mean) == len(evidence["hellinger_squared"]) == 23
    assert ((low <= mean) & (mean <= high)).all()
    assert set(np.argsort(-mean)[:2]) == {4, 13}  # gap g is between layers g and g + 1
    assert bands["null"] == pytest.approx(np.median(np.delete(mean, [4, 13])))
    assert len(evidence["gain"]) == len(evidence["support"]) == 2
    assert min(evidence["gain"]) > evidence["penalty"] > 0
    inside = np.median(np.delete(evidence["hellinger_squared"], [4, 13]))
    assert min(evidence["noise"], evidence["drift"]) > 0.01
    assert evidence["noise"] + evidence["drift"] == pytest.approx(inside)


def test_a_gap_that_no_sample_knows_is_null_in_the_evidence():
    maps = planted_maps(24, (12,), num_samples=2)
    maps[0][3] = 0.0
    maps[1][4] = 0.0
    found = DistributionShift(resamples=1).detect(maps)
    assert found.change_points == [12]
    assert [gap for gap, mean in enumerate(found.evidence["shift"]["mean"]) if mean is None] == [3]
    assert found.evidence["shift"]["null"] > 0


@pytest.mark.slow
def test_the_penalty_keeps_its_promise_on_its_own_null():
    """Gaussian layers with noise and drift alone: 1 % false alarms; more than 3 of 40 by chance: 6e-4."""
    detector = DistributionShift()
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        uneven = np.exp(detector.spread * rng.standard_normal((20, 1)))
        signal = 0.2 * uneven * rng.standard_normal((20, 15))
        signal += np.cumsum(0.1 * rng.standard_normal((20, 15)), axis=0)
        alarms += bool(detector._search(signal @ signal.T, seed)[0])
    assert alarms <= 3


def test_segmentation_is_the_cheapest_of_all():
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
        assert tuple(_segment(table, penalty)) == min(costs, key=costs.__getitem__), trial
        threshold = _breaking_penalty(table[None])[0]
        assert _segment(table, 1.001 * threshold) == []
        assert _segment(table, 0.999 * threshold) != []


# --- both --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detection_is_named_reproducible_and_json(name: str):
    maps = planted_maps(24, (5, 14), noise=1.0)
    first, second = (get_detector(name).detect(maps, seed=5) for _ in range(2))
    assert first == second
    assert first.detector == name == get_detector(name).name
    assert json.loads(json.dumps(first.evidence, allow_nan=False)) == first.evidence
    assert all(type(layer) is int for layer in first.change_points)
    other = get_detector(name).detect(maps, seed=6)
    assert other.evidence != first.evidence


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_too_few_layers_give_no_change_point_and_say_so(name: str, num_layers: int):
    found = get_detector(name).detect(planted_maps(num_layers, ()))
    assert found.change_points == []
    assert f"{num_layers} layers" in found.evidence["reason"]
    assert get_detector(name).detect(planted_maps(4, (), noise=0.1)).evidence["num_layers"] == 4


@pytest.mark.parametrize("name", DETECTORS)
def test_maps_without_any_attention_give_no_change_point_and_say_so(name: str):
    found = get_detector(name).detect([np.zeros((12, 8))] * 3)
    assert found.change_points == []
    assert "too few" in found.evidence["reason"]


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("bad", [[], [np.full((12, 4), np.nan)], [np.ones((12, 4)), np.ones((11, 4))]])
def test_bad_maps_are_refused(name: str, bad: Maps):
    with pytest.raises(ValueError, match="maps"):
        get_detector(name).detect(bad)


def test_detectors_are_found_by_name():
    assert DEFAULT_DETECTOR in DETECTORS
    with pytest.raises(ValueError, match="attention_shift, token_curve"):
        get_detector("eye")
