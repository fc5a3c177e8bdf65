"""What a run has profiled, and whether two profiles are the same."""

from __future__ import annotations

import numpy as np

from schedule_finder.profiling.capture import CURVE_FIELDS, SCORE_FIELDS
from schedule_finder.profiling.store import Profile
from schedule_finder.run.folder import Run
from schedule_finder.samples import read_entries


def ids_of(run: Run) -> list[str]:
    """The run's calibration samples, in the order of its list."""
    return [entry.id for entry in read_entries(run.samples) if entry.use == "calibration"]


def in_memory(profile: Profile) -> Profile:
    """The profile as it is now: what changes on the disk later does not reach it."""
    return profile.subset(range(len(profile)))


def assert_equal(found: Profile, expected: Profile) -> None:
    """Both profiles hold the same samples and the same numbers, bit by bit."""
    assert found.ids == expected.ids
    for name in SCORE_FIELDS:
        for one, other in zip(found.scores[name], expected.scores[name], strict=True):
            np.testing.assert_array_equal(one, other)
    for name in CURVE_FIELDS:
        np.testing.assert_array_equal(found.curves[name], expected.curves[name])
