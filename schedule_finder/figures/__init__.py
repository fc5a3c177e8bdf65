"""Step 6: the figures of a run, each as PDF and PNG beside the table it was drawn from.

The only package that imports matplotlib. It reads the run's files and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib

from schedule_finder.figures.attention import attention_map, change_points, shift
from schedule_finder.figures.convergence import convergence
from schedule_finder.figures.evaluation import accuracy
from schedule_finder.figures.overlay import overlay
from schedule_finder.figures.pareto import pareto
from schedule_finder.figures.run_data import RunData
from schedule_finder.figures.schedule import confidence, staircase
from schedule_finder.figures.sensitivity import sensitivity
from schedule_finder.figures.style import STYLE, Drawing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    import pandas as pd
    from matplotlib.figure import Figure

    from schedule_finder.run.folder import Run

FIGURES: dict[str, Callable[[RunData], Drawing | None]] = {
    "1_attention_map": attention_map,
    "2_shift": shift,
    "2_convergence": convergence,
    "3_change_points": change_points,
    "4_sensitivity": sensitivity,
    "4_schedule": staircase,
    "4_confidence": confidence,
    "4_pareto": pareto,
    "5_accuracy": accuracy,
    "6_overlay": overlay,
}


def make_figures(run: Run, names: Collection[str] = tuple(FIGURES)) -> list[Path]:
    """Draw the figures that the run has data for into ``run.figures``; returns the files written.

    Each is a PDF and a PNG, and beside them the table (CSV) that it was drawn from. A figure whose data is
    missing is left out.

    Args:
        run: the run's folder.
        names: which figures.

    Raises:
        InputError: data that is there but cannot be used; the message says which file and why.
    """
    data = RunData(run)
    written: list[Path] = []
    with matplotlib.rc_context(STYLE):
        for name in names:
            drawing = FIGURES[name](data)
            if drawing is not None:
                written += _save(run.figures / name, *drawing)
    return written


def _save(stem: Path, figure: Figure, table: pd.DataFrame) -> list[Path]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("pdf", "png", "csv")]
    # Nothing of the day or the machine, so that the same data gives the same bytes.
    figure.savefig(paths[0], metadata={"CreationDate": None})
    figure.savefig(paths[1], metadata={"Software": None})
    table.to_csv(paths[2], index=False, float_format="%.6g")
    return paths
