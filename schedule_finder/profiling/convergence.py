"""Convergence of a growing profile: when more samples no longer change its results, to a stated tolerance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pruning_runtime.schedule import Stage
from schedule_finder.change_points import DEFAULT_DETECTOR, DETECTORS
from schedule_finder.errors import InputError
from schedule_finder.files import write_text
from schedule_finder.intervals import band
from schedule_finder.profiling.store import Profile, ProfileStore
from schedule_finder.signals import carried_by_best, tokens_to_carry

FIRST_CHECK = 128
"""Samples at the first check; each further check is at twice as many."""
TOLERANCE = 0.02
"""Largest error of the ratios: half the width of their 95 % interval, as a fraction of all tokens."""
CARRIED = 0.9
"""A layer needs as many tokens as carry this share of its attention on vision."""
SHOWN_BUDGET = 0.35
"""Budget (processed) of the schedules in the figure."""
_DTYPES = {
    "samples": int,
    "change_points": str,
    "first_half": str,
    "second_half": str,
    "stable": bool,
    "ratio_error": float,
    "converged": bool,
    "stages": str,
}
_TEXTS = [name for name, kind in _DTYPES.items() if kind is str]
_OLD_COLUMNS = {"standing": "stable", "enough": "converged"}
"""Names in files of earlier releases."""


@dataclass(frozen=True)
class Check:
    """Results of a profile so far.

    Attributes:
        samples: number of samples.
        change_points: by the default detector, on all samples.
        halves: the same on two random halves.
        ratio_error: half the width of the 95 % interval (bootstrap over samples) of the share of tokens that a
            layer needs, at the layer where it is widest.
        stages: by the solver ``retained`` at a budget of 35 %; empty where that is out of reach.
    """

    samples: int
    change_points: list[int]
    halves: tuple[list[int], list[int]]
    ratio_error: float
    stages: tuple[Stage, ...] = ()

    @property
    def stable(self) -> bool:
        """Whether both halves have the change points of the whole, to within a layer."""
        return all(
            len(half) == len(self.change_points)
            and all(abs(a - b) <= 1 for a, b in zip(half, self.change_points, strict=True))
            for half in self.halves
        )

    @property
    def converged(self) -> bool:
        """Whether change points and ratios are within the tolerance."""
        return self.stable and self.ratio_error <= TOLERANCE

    def row(self) -> dict[str, object]:
        """As a row of the CSV file."""

        def plain(points: list[int]) -> str:
            return " ".join(map(str, points))

        return {
            "samples": self.samples,
            "change_points": plain(self.change_points),
            "first_half": plain(self.halves[0]),
            "second_half": plain(self.halves[1]),
            "stable": self.stable,
            "ratio_error": round(self.ratio_error, 5),
            "converged": self.converged,
            "stages": " ".join(f"{stage.layer}:{stage.keep_ratio:.3f}" for stage in self.stages),
        }


class Convergence:
    """Checks a growing profile at doubling sizes and stores the checks in a CSV file, from which it continues.

    Called before the first shard and after each; returns True once the profile has converged.
    """

    def __init__(self, path: Path, *, seed: int = 0) -> None:
        self._path = path
        self._seed = seed
        self._table = _read(path) if path.exists() else None

    def __call__(self, store: ProfileStore) -> bool:
        """Check if a check is due; return whether the last check found the profile converged."""
        count, due = len(store.ids()), FIRST_CHECK
        known = pd.DataFrame() if self._table is None else self._table[self._table.samples <= count]
        while len(known) and due <= known.samples.max():
            due *= 2
        if count >= due:
            row = pd.DataFrame([check_profile(store.read(), seed=self._seed).row()]).astype(_DTYPES)
            self._table = known = pd.concat([known, row], ignore_index=True)
            write_text(self._path, self._table.to_csv(index=False))
        return bool(len(known)) and bool(known.converged.iloc[-1])

    def __str__(self) -> str:
        """The last check as a sentence."""
        if self._table is None or not len(self._table):
            return f"fewer than {FIRST_CHECK} samples: not checked"
        last = self._table.iloc[-1]
        agree = "the same" if last.stable else "not the same"
        return (
            f"{last.samples} samples: change points {last.change_points or 'none'}, {agree} in both halves; ratios "
            f"known to +-{last.ratio_error:.3f} (tolerance {TOLERANCE})"
        )


def _read(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, dtype=dict.fromkeys(_TEXTS, str), keep_default_na=False)
    return table.rename(columns=_OLD_COLUMNS).astype(_DTYPES)


def check_profile(profile: Profile, *, seed: int = 0) -> Check:
    """Change points, their stability, and the error of the ratios."""
    order = np.random.default_rng(seed).permutation(len(profile))
    middle = len(order) // 2
    first, second = (
        _change_points(profile.subset(np.sort(some)), seed) for some in (order[:middle], order[middle:])
    )
    needed = band(np.stack([tokens_needed(sample) for sample in profile.maps]), seed=seed)
    return Check(
        samples=len(profile),
        change_points=(points := _change_points(profile, seed)),
        halves=(first, second),
        ratio_error=float((needed.high - needed.low).max() / 2),
        stages=_stages(profile, points),
    )


def tokens_needed(sample: np.ndarray) -> np.ndarray:
    """Share of the vision tokens that carry `CARRIED` of each layer's attention on vision, ``[layers]``."""
    return tokens_to_carry(carried_by_best(sample), CARRIED) / sample.shape[1]


def _change_points(profile: Profile, seed: int) -> list[int]:
    return DETECTORS[DEFAULT_DETECTOR]().detect(profile.maps, seed=seed).change_points


def _stages(profile: Profile, change_points: list[int]) -> tuple[Stage, ...]:
    # Here: the figures import this module for its names only.
    from schedule_finder.measuring.token_policy import TokenPolicy
    from schedule_finder.solvers import BudgetTarget, Problem
    from schedule_finder.solvers.retained import Retained

    budget = BudgetTarget(
        "processed",
        SHOWN_BUDGET,
        profile.shape,
        profile.mean_vision,
        profile.mean_other,
        scoring_layers=profile.layers,
    )
    try:
        return Retained().solve(Problem(profile, change_points, budget, TokenPolicy("text_guided"))).stages
    except InputError:
        return ()
