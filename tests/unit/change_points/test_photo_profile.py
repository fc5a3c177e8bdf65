"""What is stable in a pretrained decoder: SmolLM2-135M, 30 layers, 48 photographs.

``tests/data/photo_layer_distances.npz`` holds the layer distances of every sample, computed from its profile.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from schedule_finder.change_points import AttentionShift, ChangePoints
from schedule_finder.change_points.distances import LayerDistances

DATA = Path(__file__).parents[2] / "data" / "photo_layer_distances.npz"
LAYERS = 30


def distances(view: str, some: np.ndarray | None = None) -> LayerDistances:
    with np.load(DATA) as data:
        flat, uniform = data[f"{view}_pairs"].astype(float), data[f"{view}_to_uniform"].astype(float)
    pairs = np.zeros((len(flat), LAYERS, LAYERS))
    first, second = np.triu_indices(LAYERS, 1)
    pairs[:, first, second] = pairs[:, second, first] = flat
    some = np.arange(len(flat)) if some is None else some
    return LayerDistances(np.arange(LAYERS), pairs[some], uniform[some], LAYERS)


def found_in(view: str, some: np.ndarray | None = None) -> ChangePoints:
    return AttentionShift().detect_in(distances(view, some))


def test_regimes_and_isolated_layers_of_all_samples() -> None:
    found = found_in("uniform_text")
    assert found.used == pytest.approx([9, 20], abs=1)
    assert 20 in found.used_isolated
    assert {layer.layer for layer in found.isolated_layers} <= {18, 20}


@pytest.mark.parametrize("seed", range(3))
def test_both_halves_of_the_samples_have_the_same_regimes(seed: int) -> None:
    order = np.random.default_rng(seed).permutation(48)
    for half in (order[:24], order[24:]):
        found = found_in("uniform_text", half)
        assert found.change_points == pytest.approx([9, 20], abs=1)
        assert 20 in [layer.layer for layer in found.isolated_layers]


def test_the_text_guided_score_has_the_same_regimes() -> None:
    assert found_in("text_guided").change_points == pytest.approx([9, 20], abs=1)


def test_the_layers_that_attend_alike_are_where_the_log_says() -> None:
    """Layers 1 and 2 are nearer to 9-11, 16 and 19 than to 3-8 between them: a pattern that returns."""
    mean = distances("uniform_text").mean()[0][0]
    returns, between = [9, 10, 11, 16, 19], [3, 4, 5, 6, 7, 8]
    assert mean[np.ix_([1, 2], returns)].mean() < 0.7 * mean[np.ix_([1, 2], between)].mean()
