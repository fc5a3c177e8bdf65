"""How many samples of a run are done or skipped, and when too many are skipped."""

from __future__ import annotations

from collections.abc import Sequence

from schedule_finder.errors import InputError
from schedule_finder.samples.entries import SampleEntry, Use

MOST_SKIPPED = 0.05
"""Share of samples that may be unusable before a run stops: beyond it the data set is the problem."""
LEAST_TRIED = 60


def count_by_status(entries: Sequence[SampleEntry], use: Use) -> dict[str, int]:
    """Numbers of samples for ``use`` that are ``done`` and ``skipped``."""
    mine = [entry for entry in entries if entry.use == use]
    return {status: sum(entry.status == status for entry in mine) for status in ("done", "skipped")}


def check_skipped(skipped: Sequence[SampleEntry], tried: int, total: int, most: float = MOST_SKIPPED) -> None:
    """Raise `InputError` where more than a share ``most`` of the samples tried so far cannot be used."""
    if (tried >= LEAST_TRIED or tried == total) and len(skipped) > most * tried:
        raise InputError(
            f"{len(skipped)} of {tried} samples cannot be used, more than {most:.0%}; the last: "
            f"{skipped[-1].id}: {skipped[-1].reason} (all reasons are in 1_samples.jsonl; --max-skipped allows more)"
        )
