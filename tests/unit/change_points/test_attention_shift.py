"""The default detector on maps whose regimes, isolated layers and noise are known."""

from __future__ import annotations

import numpy as np
import pytest

from schedule_finder.change_points import AttentionShift, ChangePoints
from schedule_finder.change_points.distances import curve_distances, layer_distances
from tests.support.planted_maps import NUM_VISION, planted_maps

QUICK = AttentionShift(simulations=100, resamples=40)


@pytest.mark.parametrize("boundaries", [(6,), (4, 11), (3, 9, 21)])
def test_shifts_without_noise_are_found_exactly(boundaries: tuple[int, ...]) -> None:
    found = QUICK.detect(planted_maps(28, boundaries, noise=0.05))
    assert found.change_points == list(boundaries)
    assert found.used == list(boundaries)
    assert [(regime.first, regime.last) for regime in found.regimes] == [
        (a, b - 1) for a, b in zip((0, *boundaries), (*boundaries, 28), strict=True)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_isolated_layers_are_named_and_are_no_boundary(seed: int) -> None:
    found = QUICK.detect(planted_maps(26, (12,), noise=0.4, isolated=(4, 17, 20), seed=seed))
    assert found.change_points == [12]
    assert [layer.layer for layer in found.isolated_layers] == [4, 17, 20]
    assert all(layer.support > 0.9 and layer.shared < 0.25 for layer in found.isolated_layers)
    assert found.used_isolated == [4, 17, 20]


def test_a_regime_that_returns_has_the_same_cluster() -> None:
    found = QUICK.detect(planted_maps(27, (8, 13, 20), noise=0.3, groups=(0, 1, 0, 2)))
    assert found.change_points == [8, 13, 20]
    assert [regime.cluster for regime in found.regimes] == [0, 1, 0, 2]


def test_layers_of_very_different_noise_are_no_change() -> None:
    """At the 1 % level, more than 2 of 16 alarms by chance: 5e-4. The noise grows or alternates, .3 to 2 nats."""
    alarms = []
    for seed in range(16):
        growing = np.linspace(0.3, 2.0, 22)
        noise = growing if seed % 2 else np.random.default_rng(seed).permutation(growing)
        alarms.append(QUICK.detect(planted_maps(22, (), noise=noise.tolist(), seed=seed)).change_points)
    assert sum(map(bool, alarms)) <= 2, alarms


def test_drift_alone_is_no_change() -> None:
    alarms = [
        QUICK.detect(planted_maps(24, (), noise=noise, drift=0.3, seed=seed)).change_points
        for seed in range(8)
        for noise in (0.0, 0.5)
    ]
    assert sum(map(bool, alarms)) <= 2, alarms


def test_a_constant_profile_has_no_change_point() -> None:
    rng = np.random.default_rng(0)
    maps = [np.tile(rng.random(30), (16, 1)) * rng.uniform(0.1, 1.0, (16, 1)) for _ in range(5)]
    found = QUICK.detect(maps)
    assert found.changes == found.isolated_layers == []
    assert QUICK.detect(maps[:1]).changes == []


def test_only_the_distribution_counts_not_its_mass_nor_the_order_of_samples_and_tokens() -> None:
    rng = np.random.default_rng(0)
    maps = planted_maps(20, (6, 13), noise=0.5)
    other = [m[:, rng.permutation(NUM_VISION)] * rng.uniform(0.1, 1.0, (20, 1)) for m in reversed(maps)]
    first, second = QUICK.detect(maps), QUICK.detect(other)
    assert first.change_points == second.change_points == [6, 13]
    assert [c.effect for c in first.changes] == pytest.approx([c.effect for c in second.changes], rel=1e-3)


def test_layers_without_attention_are_left_out_and_numbers_stay_the_backbones() -> None:
    maps = planted_maps(24, (5, 14), noise=0.1)
    for sample in maps:
        sample[[1, 5, 9, 23]] = 0.0
    found = QUICK.detect(maps, layers=range(100, 124))
    assert found.change_points == [106, 114]  # 105 is empty: the new regime is first seen in 106
    assert found.evidence.layers == [100 + layer for layer in range(24) if layer not in (1, 5, 9, 23)]
    assert found.regimes[0].first == 100


def test_a_layer_missing_in_some_samples_is_no_change() -> None:
    maps = planted_maps(24, (12,), noise=0.1, num_samples=10)
    for sample in maps[:6]:
        sample[[0, 1, 6, 7, 20]] = 0.0
    maps.append(np.zeros((24, 9)))  # a sample without any attention on vision
    assert QUICK.detect(maps).change_points == [12]


def test_support_is_the_share_of_resamples_that_find_it_again() -> None:
    """Few samples move: resamples with fewer of them than it takes find nothing."""
    steady, moving = planted_maps(20, (), noise=0.1, num_samples=9), planted_maps(20, (10,), noise=0.1)
    everyone = AttentionShift(resamples=40, simulations=100).detect(moving)
    one = AttentionShift(resamples=400, simulations=100).detect([*steady, moving[0]])
    assert [change.support for change in everyone.changes] == [1.0]
    # One sample of ten moves: it is missing in .9 ** 10 = 35 % of draws and in every other half.
    expected = (1 - 0.9**10 + 0.5) / 2
    assert one.change_points == [10]
    assert one.changes[0].support == pytest.approx(expected, abs=0.07)


def test_distances_between_regimes_are_unbiased() -> None:
    """Without a change the effect size of a split in the middle is 0 on average, at any noise."""
    from schedule_finder.change_points.regimes import unbiased_distance

    values = []
    for seed in range(60):
        noise = np.random.default_rng(seed).uniform(0.3, 1.5, 12)
        mean = layer_distances(planted_maps(12, (), noise=noise.tolist(), seed=seed)).mean()[0][0]
        values.append(unbiased_distance(mean, np.arange(6), np.arange(6, 12)))
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    assert error < 0.02


def test_own_parts_follow_each_layers_noise() -> None:
    noise = [0.3, 1.5] * 12
    evidence = QUICK.detect(planted_maps(24, (), noise=noise, num_samples=30)).evidence
    own = np.array(evidence.own)
    # Independent noise of s nats adds s ** 2 / 8 to the Bhattacharyya distance; 1.5 nats and .3 more per sample.
    assert np.median(own[1::2]) == pytest.approx(1.5**2 * 1.09 / 8, rel=0.35)
    assert np.median(own[::2]) < np.median(own[1::2]) / 2
    assert len(evidence.own_error) == 24
    assert max(evidence.own_error) < 0.1


def test_a_curve_is_segmented_by_its_mean() -> None:
    rng = np.random.default_rng(0)
    level = np.where(np.arange(20) < 8, 0.2, 0.6)
    curve = level + 0.02 * rng.standard_normal((30, 20)) + 0.05 * rng.standard_normal((30, 1))
    found = QUICK.detect_in(curve_distances(curve))
    assert found.change_points == [8]
    assert found.isolated_layers == []


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_too_few_layers_give_no_change_point_and_say_so(num_layers: int) -> None:
    found = QUICK.detect(planted_maps(num_layers, ()))
    assert found.changes == []
    assert f"{num_layers} layers" in str(found.evidence.reason)


def test_a_result_survives_json() -> None:
    found = QUICK.detect(planted_maps(24, (5, 14), noise=0.5, isolated=(9,)))
    document = found.to_json()
    assert document.pop("change_points") == document.pop("used") == [5, 14]
    assert ChangePoints.model_validate(document) == found
