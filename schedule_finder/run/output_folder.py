"""Where a run may be written. Every function raises `InputError`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from schedule_finder.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_folder(folder: Path) -> None:
    """Check that ``folder`` exists or can be made, and can be written to."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise InputError(f"--out {folder}: {there} is a file, not a folder; choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--out {folder}: {there} cannot be written to; choose another --out")


def check_not_among_data(folder: Path, dataset: Sequence[str]) -> None:
    """Refuse an output folder in which the run's files would become part of the data.

    That is a data folder or a folder in it, and the folder of a data file itself: a folder below that is fine, since
    the file names its images.
    """
    out = folder.expanduser().resolve()
    for given in dataset:
        location = Path(
            given if Path(given).expanduser().exists() else given.partition("=")[2] or given
        ).expanduser()
        if not location.exists():
            continue
        place = location.resolve()
        if (place.is_dir() and out.is_relative_to(place)) or out == place.parent:
            where = "inside" if place.is_dir() and out != place else "the folder of"
            raise InputError(
                f"--out {folder}: {where} the data set {given!r}; "
                "the run's files would mix with the data: choose another --out"
            )
