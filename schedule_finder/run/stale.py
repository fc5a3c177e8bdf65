"""What in a run folder was made from another schedule than the selected one."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from schedule_finder.errors import InputError
from schedule_finder.evidence import HeldOutSummary
from schedule_finder.files import parse_json

if TYPE_CHECKING:
    from pathlib import Path

    from schedule_finder.run.folder import Run
    from schedule_finder.run.schedules import NamedSchedule

FIGURE_KEY = "Schedule"
"""Field of a figure's PNG that holds the digest of the schedule it was drawn from."""
_OF_A_SCHEDULE = ("4_schedule", "5_accuracy", "6_overlay")
"""Figures that always show a schedule."""


@dataclass(frozen=True)
class Stale:
    """Files that do not belong to the selected schedule.

    Attributes:
        files: names within the run folder.
        reason: which schedule they were made from.
        renew: the command that makes them anew.
    """

    files: tuple[str, ...]
    reason: str
    renew: str

    def __str__(self) -> str:
        return f"stale: {', '.join(self.files)} ({self.reason}); renew with `{self.renew}`"


def find_stale(run: Run) -> list[Stale]:
    """Evaluations, example and figures of another schedule than the selected one. Raises `ScheduleError`."""
    selected = run.schedules.selected()
    if selected is None:
        return []
    found = [_evaluation(run, selected), _example(run, selected), _figures(run, selected)]
    return [stale for stale in found if stale is not None]


def example_digest(path: Path) -> str | None:
    """The digest in ``5_example.json``; None where there is none or the file cannot be read."""
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = document.get("schedule") if isinstance(document, dict) else None
    return found if isinstance(found, str) else None


def figure_digest(path: Path) -> str | None:
    """The digest in a figure's PNG; None where there is none."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    position = 8  # after the signature; then length, type, data and checksum of each chunk
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        data = content[position + 8 : position + 8 + length]
        if kind == b"tEXt" and data.startswith(FIGURE_KEY.encode() + b"\0"):
            return data.partition(b"\0")[2].decode("latin-1")
        if kind == b"IDAT":
            return None
        position += 12 + length
    return None


def _evaluation(run: Run, selected: NamedSchedule) -> Stale | None:
    if not run.evaluation.exists():
        return None
    try:
        summary = HeldOutSummary.load(run.evaluation_summary)
    except InputError:  # a command that has written its result is not refused for this
        reason = f"{run.evaluation_summary.name} cannot be read"
        return Stale((run.evaluation.name,), reason, f"adaptinfer-profile evaluate {run.folder}")
    if summary is None:
        reason = "does not say which schedule it is of"
    elif summary.of(selected.digest) is not None:
        return None
    else:
        reason = f"of {summary.name or 'another schedule'}, selected is {selected.name}"
    return Stale((run.evaluation.name,), reason, f"adaptinfer-profile evaluate {run.folder}")


def _example(run: Run, selected: NamedSchedule) -> Stale | None:
    path = run.folder / "5_example.json"
    found = example_digest(path)
    if not path.exists() or found == selected.digest:
        return None
    reason = "of another schedule" if found else "does not say which schedule it is of"
    return Stale((path.name,), reason, f"adaptinfer-profile evaluate {run.folder}")


def _figures(run: Run, selected: NamedSchedule) -> Stale | None:
    wrong: dict[str, str | None] = {}
    for path in sorted(run.figures.glob("*.png")):
        found = figure_digest(path)
        if found != selected.digest and (found is not None or path.stem in _OF_A_SCHEDULE):
            wrong[f"{run.figures.name}/{path.stem}"] = found
    if not wrong:
        return None
    reason = "drawn from another schedule" if any(wrong.values()) else "do not say which schedule they show"
    return Stale(tuple(wrong), reason, f"adaptinfer-profile plot {run.folder}")
