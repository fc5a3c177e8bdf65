"""Step 7: one HTML file about a run or several, with a viewer of held-out samples.

recording.py and placement.py run the model on the samples of the viewer; viewer.py is their file. charts.py and facts.py
make charts, words and tables from the files of a run; page.py puts them into one page.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from schedule_finder.errors import InputError
from schedule_finder.files import write_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from schedule_finder.run.folder import Run

_NEEDED = {"altair": "altair", "vl_convert": "vl-convert-python", "jinja2": "jinja2"}
"""Module to the package that brings it."""


def missing_packages() -> list[str]:
    """Packages of the extra ``report`` that are not installed."""
    return [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]


def check_packages() -> None:
    """Raise `InputError` where a package of the extra ``report`` is missing."""
    if missing := missing_packages():
        raise InputError(
            f"the report needs {', '.join(missing)}; install the extra: pip install 'adaptinfer[report]'"
        )


def write_report(runs: Sequence[Run], path: Path, reasons: Sequence[str | None] | None = None) -> Path:
    """Write one HTML file about the runs; returns its path.

    Args:
        runs: one or several; several are compared.
        path: of the file.
        reasons: for each run, why its viewer was not recorded; shown where it has none.

    Raises:
        InputError: a file of a run, or a package, cannot be used.
    """
    check_packages()
    from schedule_finder.report.page import render

    write_text(path, render(runs, reasons or [None] * len(runs)))
    return path
