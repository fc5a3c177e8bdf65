"""Convergence: checks at doubling sizes, tighter with more samples, and the same after an interruption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from schedule_finder.change_points.base import REPORTED_SUPPORT, USED_SUPPORT
from schedule_finder.profiling.capture import CURVE_FIELDS, SCORE_FIELDS, ProfileRow
from schedule_finder.profiling.convergence import TOLERANCE, Check, Convergence, check_profile, tokens_needed
from schedule_finder.profiling.store import ProfileStore
from tests.support.planted_maps import planted_maps
from tests.support.solver_profiles import shape_of

LAYERS = 8
TOKENS = 20


def rows_of(count: int, seed: int, spread: float) -> list[ProfileRow]:
    """Samples whose layers need more or fewer tokens; ``spread``: how unlike samples are."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        focus = np.exp(spread * rng.standard_normal())
        attention = np.sort(rng.dirichlet(np.full(TOKENS, focus)))[::-1]
        maps = np.tile(attention, (LAYERS, 1)).astype(np.float32)
        curves = {name: np.zeros(LAYERS, np.float32) for name in CURVE_FIELDS}
        rows.append(ProfileRow(TOKENS, 5, 8, dict.fromkeys(SCORE_FIELDS, maps), curves))
    return rows


def store_in(folder: Path, layers: int = LAYERS) -> ProfileStore:
    shape = shape_of(layers)
    store = ProfileStore(folder)
    store.open(
        {
            "backbone": {"name": "planted", "num_layers": layers},
            "shape": {name: getattr(shape, name) for name in shape.__slots__},
            "layers": list(range(layers)),
            "dtype": "float32",
            "prompt_digest": "",
        }
    )
    return store


def grow(store: ProfileStore, convergence: Convergence, spread: float, until: int) -> list[int]:
    """Add shards of 64; the sizes at which it was enough."""
    enough = []
    for number in range(len(store.ids()), until, 64):
        store.append([f"{number + i:05d}" for i in range(64)], rows_of(64, number, spread))
        if convergence(store):
            enough.append(number + 64)
    return enough


def test_like_samples_are_soon_enough(tmp_path: Path) -> None:
    store, convergence = store_in(tmp_path / "profile"), Convergence(tmp_path / "checks.csv")
    assert grow(store, convergence, 0.0, 128) == [128]
    assert "128 samples: change points none (0.9 asked for)" in str(convergence)


def test_unlike_samples_take_more_and_checks_double(tmp_path: Path) -> None:
    store, convergence = store_in(tmp_path / "profile"), Convergence(tmp_path / "checks.csv")
    enough = grow(store, convergence, 1.5, 1024)
    checks = pd.read_csv(tmp_path / "checks.csv")
    assert checks.samples.tolist() == [128, 256, 512, 1024]
    assert checks.ratio_error.is_monotonic_decreasing
    # Twice as many samples, narrower by the square root of two.
    assert checks.ratio_error.iloc[-1] == pytest.approx(checks.ratio_error.iloc[0] / 8**0.5, rel=0.3)
    assert not checks.converged.iloc[0]
    assert enough
    assert min(enough) in checks.samples.tolist()
    assert (checks.converged == (checks.ratio_error <= TOLERANCE)).all()


def test_an_interrupted_run_checks_nothing_twice(tmp_path: Path) -> None:
    store = store_in(tmp_path / "profile")
    grow(store, Convergence(tmp_path / "checks.csv"), 1.5, 320)
    before = (tmp_path / "checks.csv").read_text()
    again = Convergence(tmp_path / "checks.csv")
    assert not again(store)
    assert (tmp_path / "checks.csv").read_text() == before
    grow(store, again, 1.5, 512)
    assert pd.read_csv(tmp_path / "checks.csv").samples.tolist() == [128, 256, 512]


def test_a_finished_run_stays_finished(tmp_path: Path) -> None:
    store = store_in(tmp_path / "profile")
    assert grow(store, Convergence(tmp_path / "checks.csv"), 0.0, 128) == [128]
    assert Convergence(tmp_path / "checks.csv")(store)


def test_checks_of_samples_that_are_gone_do_not_count(tmp_path: Path) -> None:
    """The profile was set aside, its checks are still there."""
    assert grow(store_in(tmp_path / "profile"), Convergence(tmp_path / "checks.csv"), 0.0, 128) == [128]
    assert not Convergence(tmp_path / "checks.csv")(store_in(tmp_path / "another"))


def test_the_tokens_that_a_layer_needs() -> None:
    sample = np.array([[0.5, 0.4, 0.06, 0.04], [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]])
    assert tokens_needed(sample).tolist() == [0.5, 1.0, 0.25]


@pytest.mark.parametrize(
    ("support", "stable"), [([1.0, 0.9], True), ([], True), ([1.0, 0.895], False), ([0.5, 1.0], False)]
)
def test_change_points_are_stable_with_the_support_that_schedules_ask_for(
    support: list[float], stable: bool
) -> None:
    check = Check(100, [4, 9][: len(support)], support, ratio_error=0.001)
    assert check.stable is stable
    assert check.converged is stable
    assert not Check(100, [4, 9][: len(support)], support, ratio_error=TOLERANCE * 1.01).converged


def planted_store(folder: Path, with_change: int, samples: int) -> ProfileStore:
    """A profile of 14 layers; the first ``with_change`` of the samples change at layer 7, the others nowhere."""
    store = store_in(folder, 14)
    changing = planted_maps(14, (7,), noise=0.3, num_samples=samples)
    steady = planted_maps(14, (), noise=0.3, num_samples=samples)
    maps = [changing[i] if i < with_change else steady[i] for i in range(samples)]
    curves = {name: np.zeros(14, np.float32) for name in CURVE_FIELDS}
    rows = [
        ProfileRow(m.shape[1], 5, 8, dict.fromkeys(SCORE_FIELDS, m.astype(np.float32)), curves) for m in maps
    ]
    store.append([f"{i:05d}" for i in range(samples)], rows)
    return store


def test_a_change_in_all_samples_converges_and_one_in_a_single_sample_does_not(tmp_path: Path) -> None:
    everywhere = Convergence(tmp_path / "all.csv")
    assert everywhere(planted_store(tmp_path / "all", 128, 128))
    assert "change points 7 with support 1.000" in str(everywhere)
    # Half of the halves and a third of the bootstrap draws lack the one sample that changes.
    check = check_profile(planted_store(tmp_path / "one", 1, 4).read())
    assert check.change_points == [7]
    assert REPORTED_SUPPORT <= check.support[0] < USED_SUPPORT
    assert not check.stable


def test_a_check_is_about_the_whole_profile(tmp_path: Path) -> None:
    store = store_in(tmp_path / "profile")
    store.append([f"{i:03d}" for i in range(64)], rows_of(64, 0, 0.5))
    check = check_profile(store.read())
    assert check.samples == 64
    assert check.stages


def test_checks_of_an_earlier_release_are_continued(tmp_path: Path) -> None:
    path = tmp_path / "checks.csv"
    path.write_text(
        "samples,change_points,first_half,second_half,standing,ratio_error,enough,stages\n"
        "128,3,3,4,True,0.03,False,\n"
    )
    store = store_in(tmp_path / "profile")
    assert grow(store, Convergence(path), 0.0, 256) == [256]
    checks = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert checks[["samples", "stable", "converged"]].iloc[0].tolist() == ["128", "True", "False"]
    assert "first_half" not in checks
    assert checks.samples.tolist() == ["128", "256"]
