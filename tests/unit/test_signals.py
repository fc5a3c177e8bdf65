"""Curves per layer: divergences against scipy's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from schedule_finder.signals import checked_maps, layer_shift, top_token_curves, vision_curve


def random_maps(num_samples: int = 5, num_layers: int = 6, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    maps = [rng.random((num_layers, rng.integers(3, 9))) ** 4 for _ in range(num_samples)]
    for sample in maps:
        sample[rng.random(sample.shape) < 0.2] = 0.0
        sample[:, 0] += 1e-3  # no empty row
    return maps


def test_layer_shift_is_scipys_jensen_shannon_divergence_in_bits():
    maps = random_maps()
    shift = layer_shift(maps)
    # scipy gives the distance, the square root of the divergence.
    expected = [[jensenshannon(p, q, base=2) ** 2 for p, q in itertools.pairwise(m)] for m in maps]
    assert shift == pytest.approx(np.array(expected), abs=1e-12)


def test_layer_shift_is_0_for_equal_and_1_for_disjoint_layers_whatever_their_mass():
    sample = np.array([[0.1, 0.3, 0.0], [0.2, 0.6, 0.0], [0.0, 0.0, 0.01]])
    assert layer_shift([sample])[0] == pytest.approx([0.0, 1.0])


def test_layer_shift_of_an_empty_layer_is_unknown_and_not_zero():
    sample = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert layer_shift([sample])[0] == pytest.approx([np.nan, np.nan, 1.0], nan_ok=True)


def test_vision_curve_sums_mass_per_layer_of_ragged_samples():
    maps = [np.array([[0.1, 0.2], [0.3, 0.0]]), np.array([[0.5, 0.0, 0.25], [0.0, 0.0, 0.0]])]
    assert vision_curve(maps) == pytest.approx(np.array([[0.3, 0.3], [0.75, 0.0]]))


def test_top_token_curves_accumulate_the_tenth_with_most_attention():
    rng = np.random.default_rng(0)
    sample = rng.random((4, 20))
    sample[:, [3, 11]] += 2.0
    curves = top_token_curves(sample)
    assert sorted(curves[:, -1]) == pytest.approx(sorted(sample[:, [3, 11]].sum(axis=0)))
    assert np.diff(curves, axis=1, prepend=0.0) == pytest.approx(
        sample[:, [3, 11]].T if sample[:, 3].sum() > sample[:, 11].sum() else sample[:, [11, 3]].T
    )


def test_top_token_curves_take_58_of_576_and_no_token_without_attention():
    assert top_token_curves(np.ones((3, 576))).shape == (58, 3)
    assert top_token_curves(np.ones((3, 2))).shape == (1, 3)
    assert top_token_curves(np.eye(3, 40)).shape == (3, 3)  # four are asked for, three got anything


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([], "0 samples"),
        ([np.ones((4, 0))], "none with vision tokens"),
        ([np.ones((4, 3)), np.ones((5, 3))], r"maps\[1\]: 5 layers, earlier samples 4"),
        ([np.ones(4)], r"maps\[0\]: shape \(4,\)"),
        ([np.ones((2, 2)), np.array([[1.0, np.nan], [1.0, 1.0]])], r"maps\[1\]: values that are NaN"),
        ([np.array([[1.0, np.inf], [1.0, 1.0]])], r"maps\[0\]: values that are NaN or infinite"),
        ([np.array([[1.0, -0.5], [1.0, 1.0]])], r"maps\[0\]: lowest value -0.5"),
    ],
)
def test_bad_maps_are_refused_by_sample(maps: list[np.ndarray], message: str):
    with pytest.raises(ValueError, match=message):
        checked_maps(maps)


def test_samples_without_vision_tokens_are_left_out():
    kept = checked_maps([np.ones((4, 0)), np.ones((4, 2), dtype=np.float32)])
    assert [k.shape for k in kept] == [(4, 2)]
    assert kept[0].dtype == np.float64
