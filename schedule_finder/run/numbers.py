"""The numbers of a run as one JSON-able document. Imports neither torch nor pandas."""

from __future__ import annotations

import csv
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from schedule_finder.errors import InputError
from schedule_finder.run.stale import find_stale

if TYPE_CHECKING:
    from pathlib import Path

    from schedule_finder.run.folder import Run


def run_numbers(run: Run) -> dict[str, Any]:
    """What the run found so far; a part that does not exist yet is None or empty.

    Returns:
        ``change_points``: by detector, and ``default``; ``schedule``: the selected one whole; ``selected``: its name;
        ``schedules``: name to stages and costs of each kept one; ``evaluation``: the rows of ``5_evaluation.csv``;
        ``stale``: files that belong to another schedule.
    """
    points = None
    if run.change_points.exists():
        from schedule_finder.run.reader import read_change_points  # imports ruptures

        points = read_change_points(run.change_points)
    selected = run.schedules.selected()
    return {
        "change_points": points and {name: one.change_points for name, one in points.detectors.items()},
        "detector": points and points.default,
        "selected": selected and selected.name,
        "schedule": selected and selected.schedule.model_dump(mode="json", exclude_none=True),
        "schedules": {
            name: run.schedules.find(name).schedule.model_dump(
                mode="json", include={"stages", "scorer", "dropped_tokens", "budget"}, exclude_none=True
            )
            for name in run.schedules.names()
        },
        "evaluation": read_rows(run.evaluation) if run.evaluation.exists() else None,
        "stale": [asdict(stale) for stale in find_stale(run)],
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table: numbers where a cell is one, None where it is empty. Raises `InputError`."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable table ({error}); evaluate again") from error
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():  # too many cells, or too few
            raise InputError(f"{path}: row {number} has not as many cells as the head; evaluate again")
    return [{name: _value(cell) for name, cell in row.items()} for row in rows]


def _value(cell: str | None) -> float | str | None:
    if not cell:
        return None
    try:
        return int(cell) if cell.lstrip("-").isdecimal() else float(cell)
    except ValueError:
        return cell
