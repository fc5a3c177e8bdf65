"""What the schedule and its controls reach on held-out samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from schedule_finder.evaluate import CONTROLS, wilson_interval
from schedule_finder.figures.run_data import RunData
from schedule_finder.figures.style import GREY, LOOKS, SINGLE, SPARE_LOOKS, Drawing, legend_above, words

if TYPE_CHECKING:
    from pruning_runtime.schedule import Schedule


def accuracy(data: RunData) -> Drawing | None:
    """Accuracy against what is really processed; agreement where the data set has no answers.

    Points of different methods at the same budget are drawn a little apart (the table has no such shift).
    """
    if data.evaluation is None:
        return None
    table = data.evaluation.copy()
    label, centre = "Exact match (%)", "exact_match"
    if table.exact_match.isna().all():
        label, centre = "Agreement with full model (%)", "agreement"
        bounds = [
            wilson_interval(round(a * n), int(n)) for a, n in zip(table.agreement, table.n, strict=True)
        ]
        table[["ci_low", "ci_high"]] = bounds
    table = table.rename(columns={centre: "value"})[
        ["method", "budget", "n", "processed", "value", "ci_low", "ci_high"]
    ].assign(measure=centre)

    figure = Figure(figsize=(SINGLE, 2.6), layout="constrained")
    axes = figure.subplots()
    full = table[table.method == "full"].iloc[0]
    axes.axhspan(100 * full.ci_low, 100 * full.ci_high, color=GREY, alpha=0.18, linewidth=0)
    axes.axhline(100 * full.value, color=GREY, linewidth=1, label="Full model")
    names = _methods_in_order(table)
    used = 100 * table.processed[table.method != "full"]
    span = max(used.max() - used.min(), 10.0)
    spare = iter(SPARE_LOOKS * len(names))
    for place, name in enumerate(names):
        rows = table[table.method == name].sort_values("processed")
        colour, marker, line = LOOKS.get(name) or next(spare)
        axes.errorbar(
            100 * rows.processed + 0.01 * span * (place - (len(names) - 1) / 2),
            100 * rows.value,
            100 * np.maximum([rows.value - rows.ci_low, rows.ci_high - rows.value], 0),
            color=colour,
            marker=marker,
            markeredgecolor="white",
            markeredgewidth=0.3,
            markersize=4.5,
            linestyle=line,
            elinewidth=0.7,
            zorder=4 if name == "schedule" else 3,
            label=_method_label(name, data.schedule),
        )
    axes.set_xlabel("Vision tokens processed (% of full model)")
    axes.set_ylabel(label)
    if names:
        middle = (used.max() + used.min()) / 2
        axes.set_xlim(middle - 0.57 * span, middle + 0.57 * span)
    axes.yaxis.grid(True, color="#DDDDDD", linewidth=0.5)
    axes.set_axisbelow(True)
    legend_above(figure, axes.get_legend_handles_labels(), columns=3)
    return figure, table


def _methods_in_order(table: pd.DataFrame) -> list[str]:
    """All but the full model: the schedule, its controls in their order, then whatever else there is."""
    there = [name for name in table.method.unique() if name != "full"]
    known = [name for name in ("schedule", *CONTROLS) if name in there]
    return known + [name for name in there if name not in known]


def _method_label(name: str, schedule: Schedule | None) -> str:
    if name == "schedule" and schedule is not None:
        return f"Schedule ({words(schedule.scorer.name)})"
    return words(name).capitalize()
