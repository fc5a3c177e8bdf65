"""Convergence of a growing profile: when more samples no longer change its results, to a stated tolerance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pruning_runtime.schedule import Stage
from schedule_finder.change_points import DEFAULT_DETECTOR, get_detector
from schedule_finder.change_points.base import USED_SUPPORT
from schedule_finder.errors import InputError
from schedule_finder.files import write_text
from schedule_finder.intervals import band
from schedule_finder.profiling.store import Profile, ProfileStore
from schedule_finder.signals import by_place, carried_by_best, in_any_order, tokens_to_carry

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
    "support": str,
    "stable": bool,
    "ratio_error": float,
    "converged": bool,
    "stages": str,
}
_TEXTS = [name for name, kind in _DTYPES.items() if kind is str]
_OLD_COLUMNS = {"standing": "stable", "enough": "converged"}
"""Names in files of earlier releases, which have the change points of two halves of the samples in place of support."""


@dataclass(frozen=True)
class Check:
    """Results of a profile so far.

    Attributes:
        samples: number of samples.
        change_points: by the default detector.
        support: of each change point, in [0, 1].
        ratio_error: half the width of the 95 % interval (bootstrap over samples) of the share of tokens that a
            layer needs, at the layer where it is widest.
        stages: by the solver ``retained`` at a budget of 35 %; empty where that is out of reach.
    """

    samples: int
    change_points: list[int]
    support: list[float]
    ratio_error: float
    stages: tuple[Stage, ...] = ()

    @property
    def stable(self) -> bool:
        """Whether every reported change point has the support that schedules ask for (`USED_SUPPORT`)."""
        return all(one >= USED_SUPPORT for one in self.support)

    @property
    def converged(self) -> bool:
        """Whether change points are stable and ratios within the tolerance."""
        return self.stable and self.ratio_error <= TOLERANCE

    def row(self) -> dict[str, object]:
        """As a row of the CSV file."""
        return {
            "samples": self.samples,
            "change_points": " ".join(map(str, self.change_points)),
            "support": " ".join(f"{one:.3f}" for one in self.support),
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
        support = f" with support {last.support}" if last.support else ""
        return (
            f"{last.samples} samples: change points {last.change_points or 'none'}{support} "
            f"({USED_SUPPORT} asked for); ratios known to +-{last.ratio_error:.3f} (tolerance {TOLERANCE})"
        )


def _read(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, dtype=dict.fromkeys(_TEXTS, str), keep_default_na=False)
    table = table.rename(columns=_OLD_COLUMNS)
    return table.reindex(columns=list(_DTYPES), fill_value="").astype(_DTYPES)


def check_profile(profile: Profile, *, seed: int = 0) -> Check:
    """Change points, their support, and the error of the ratios."""
    changes = get_detector(DEFAULT_DETECTOR).detect(profile.maps, layers=profile.layers, seed=seed).changes
    points = [change.layer for change in changes]
    tokens = {place: tokens_needed(sample) for place, sample in in_any_order(profile.maps)}
    needed = band(np.stack(by_place(tokens)), seed=seed)
    return Check(
        samples=len(profile),
        change_points=points,
        support=[1.0 if change.support is None else change.support for change in changes],
        ratio_error=float((needed.high - needed.low).max() / 2),
        stages=_stages(profile, points),
    )


def tokens_needed(sample: np.ndarray) -> np.ndarray:
    """Share of the vision tokens that carry `CARRIED` of each layer's attention on vision, ``[layers]``."""
    return tokens_to_carry(carried_by_best(sample), CARRIED) / sample.shape[1]


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
