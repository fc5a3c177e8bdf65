"""What the schedule keeps of the full model's score, by question type or benchmark."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from schedule_finder.figures.style import BLUE, GREY, SINGLE, Drawing, legend_above, words

if TYPE_CHECKING:
    from schedule_finder.figures.run_data import RunData

_COLUMNS = ["question_type", "n", "score", "score_low", "score_high"]


def retention(data: RunData) -> Drawing | None:
    """Score of the full model and of the schedule for each question type; None where there is one type only."""
    table = _by_type(data)
    if table is None:
        return None
    row = np.arange(len(table))
    figure = Figure(figsize=(SINGLE, 0.75 + 0.27 * len(table)), layout="constrained")
    axes = figure.subplots()
    looks = (("full", GREY, "o", -0.13, "Full model"), ("schedule", BLUE, "s", 0.13, "Schedule"))
    handles = []
    for name, colour, marker, offset, label in looks:
        score, low, high = (100 * table[f"{name}_{part}"] for part in ("score", "low", "high"))
        bars = np.maximum([score - low, high - score], 0)
        handles.append(
            axes.errorbar(
                score,
                row + offset,
                xerr=bars,
                fmt=marker,
                color=colour,
                markersize=4,
                elinewidth=0.8,
                label=label,
            )
        )
    labels = [f"{words(kind)} ({n})" for kind, n in zip(table.question_type, table.n, strict=True)]
    axes.set_yticks(row, labels)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.grid(True, axis="x", color="#DDDDDD", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("Score (%), 95% interval (samples)")
    legend_above(figure, handles, columns=2)
    return figure, table


def _by_type(data: RunData) -> pd.DataFrame | None:
    """Scores by question type, with the share of the full model's score that the schedule keeps."""
    both = data.evaluation_by_type
    if both is None:
        return None
    parts = [
        both[both.method == name][_COLUMNS].set_index("question_type").add_prefix(f"{name}_")
        for name in ("full", "schedule")
    ]
    table = parts[0].join(parts[1], how="inner").dropna().reset_index()
    if len(table) < 2:
        return None
    table = table.rename(columns={"schedule_n": "n"}).drop(columns="full_n")
    table.columns = table.columns.str.replace("_score_", "_")
    ratio = table.schedule_score / table.full_score.where(table.full_score > 0)
    return table.assign(n=table.n.astype(int), retained=ratio)
