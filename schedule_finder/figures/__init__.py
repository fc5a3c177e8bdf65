"""Step 6: the figures of a run, each as PDF and PNG beside the table it was drawn from.

One figure per file and one line in `FIGURES`. The only package that imports matplotlib; it reads the run's files only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib

from schedule_finder.figures.accuracy import accuracy
from schedule_finder.figures.allocation import attention_allocation
from schedule_finder.figures.attention_map import attention_map
from schedule_finder.figures.change_points import change_points
from schedule_finder.figures.convergence import convergence
from schedule_finder.figures.overlay import overlay
from schedule_finder.figures.pareto import pareto
from schedule_finder.figures.retention import retention
from schedule_finder.figures.run_data import RunData
from schedule_finder.figures.schedule import staircase
from schedule_finder.figures.sensitivity import sensitivity
from schedule_finder.figures.shift import shift
from schedule_finder.figures.style import SINGLE, STYLES
from schedule_finder.figures.time import accuracy_by_time
from schedule_finder.figures.viewed import gallery, heatmaps
from schedule_finder.run.stale import FIGURE_KEY, figure_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    import pandas as pd
    from matplotlib.figure import Figure

    from schedule_finder.figures.style import Drawing
    from schedule_finder.run.folder import Run

FIGURES: dict[str, Callable[[RunData], Drawing | None]] = {
    "1_attention_map": attention_map,
    "2_shift": shift,
    "2_convergence": convergence,
    "3_change_points": change_points,
    "4_sensitivity": sensitivity,
    "4_schedule": staircase,
    "4_pareto": pareto,
    "5_allocation": attention_allocation,
    "5_accuracy": accuracy,
    "5_time": accuracy_by_time,
    "5_retention": retention,
    "6_overlay": overlay,
    "6_gallery": gallery,
    "6_heatmaps": heatmaps,
}


_SUFFIXES = ("pdf", "png", "csv")


def make_figures(
    run: Run,
    names: Collection[str] = tuple(FIGURES),
    report: Callable[[str], None] = lambda _line: None,
    *,
    style: str = "screen",
    column: float | None = None,
) -> list[Path]:
    """Draw the figures that the run has data for into ``run.figures``; returns the files written.

    Each figure is a PDF, a PNG and the table (CSV) that it was drawn from.
    A figure whose data is missing is left out. Figures show the selected schedule only: what was evaluated on
    another one is left out too, and its old figure removed.

    Args:
        run: the run's folder.
        names: which figures.
        report: called with a line about each result that is left out because it is of another schedule.
        style: of `STYLES`; ``paper`` has a serif.
        column: width of a column in inches; None: 3.3. Figures of two columns are wider in proportion.

    Raises:
        InputError: a file cannot be used; the message says which one and why.
    """
    data = RunData(run)
    written: list[Path] = []
    with matplotlib.rc_context(STYLES[style]):
        for name in names:
            data.uses_schedule = False
            drawing = FIGURES[name](data)
            if drawing is not None:
                if column is not None:
                    width, height = drawing[0].get_size_inches() * column / SINGLE
                    drawing[0].set_size_inches(float(width), float(height))
                shown = data.digest if data.uses_schedule else None
                written += save_figure(run.figures / name, *drawing, schedule=shown)
            else:
                _remove_stale(run.figures / name, data.digest)
    for reason in data.left_out:
        report(f"{reason}: its figures are left out; renew with `adaptinfer-profile evaluate {run.folder}`")
    return written


def _remove_stale(stem: Path, digest: str | None) -> None:
    """Remove a figure that was drawn from another schedule and cannot be drawn from the selected one."""
    drawn_from = figure_digest(stem.with_name(f"{stem.name}.png"))
    if digest is not None and drawn_from not in (None, digest):
        for suffix in _SUFFIXES:
            stem.with_name(f"{stem.name}.{suffix}").unlink(missing_ok=True)


def save_figure(
    stem: Path, figure: Figure, table: pd.DataFrame, *, schedule: str | None = None
) -> list[Path]:
    """Write the figure as PDF and PNG, and its table; returns the files.

    ``schedule``: digest of the schedule that it shows, written into PDF (Keywords) and PNG (`FIGURE_KEY`).
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in _SUFFIXES]
    # Without date and software version, the same data gives the same bytes.
    figure.savefig(paths[0], metadata={"CreationDate": None, "Keywords": schedule})
    figure.savefig(paths[1], metadata={"Software": None, FIGURE_KEY: schedule})
    table.to_csv(paths[2], index=False, float_format="%.6g")
    return paths
