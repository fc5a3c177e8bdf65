"""What the schedule and its baselines reach on held-out samples."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from schedule_finder.figures.run_data import RunData
from schedule_finder.figures.style import GREY, LOOKS, OPEN, SINGLE, SPARE_LOOKS, Drawing, legend_above, words
from schedule_finder.intervals import wilson_interval

if TYPE_CHECKING:
    from pruning_runtime.schedule import Schedule


@dataclass(frozen=True)
class HeldOut:
    """Accuracy on held-out samples as figures show it.

    Attributes:
        table: a row per method and budget: ``method, budget, n, processed, value, ci_low, ci_high, measure``.
        label: of an axis that shows ``value`` in percent.
    """

    table: pd.DataFrame
    label: str

    @property
    def full(self) -> Any:
        """The full model's row."""
        return self.table[self.table.method == "full"].iloc[0]


def held_out_results(data: RunData) -> HeldOut | None:
    """Exact match, or agreement with the full model where the data set has no answers."""
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
    return HeldOut(table, label)


def accuracy(data: RunData) -> Drawing | None:
    """Accuracy against what is really processed.

    Points of different methods at the same budget are drawn a little apart (the table has no such shift).
    """
    results = held_out_results(data)
    if results is None:
        return None
    table, full = results.table, results.full
    names = _methods_in_order(table)
    used = 100 * table.processed[table.method != "full"]
    span = max(used.max() - used.min(), 10.0)
    # At a single budget there is room to set them well apart.
    apart = span * (min(0.01, 0.06 / len(names)) if used.max() - used.min() > 5 else 0.06)

    columns = 3 if len(names) <= 6 else 2
    figure = Figure(figsize=(SINGLE, 2.2 + 0.13 * (len(names) + 1) / columns), layout="constrained")
    axes = figure.subplots()
    axes.axhspan(100 * full.ci_low, 100 * full.ci_high, color=GREY, alpha=0.18, linewidth=0)
    axes.axhline(100 * full.value, color=GREY, linewidth=1, label="Full model")
    spare = iter(SPARE_LOOKS * len(names))
    for place, name in enumerate(names):
        rows = table[table.method == name].sort_values("processed")
        colour, marker, line = LOOKS.get(_kind(name)) or next(spare)
        axes.errorbar(
            100 * rows.processed + apart * (place - (len(names) - 1) / 2),
            100 * rows.value,
            100 * np.maximum([rows.value - rows.ci_low, rows.ci_high - rows.value], 0),
            color=colour,
            marker=marker,
            markeredgecolor=colour if _kind(name) in OPEN else "white",
            markerfacecolor="white" if _kind(name) in OPEN else colour,
            markeredgewidth=0.8 if _kind(name) in OPEN else 0.3,
            markersize=4.5,
            linestyle=line,
            elinewidth=0.7,
            zorder=4 if name == "schedule" else 3,
            label=_method_label(name, data.schedule),
        )
    axes.set_xlabel("Vision tokens processed (% of full model)")
    axes.set_ylabel(results.label)
    if names:
        middle, half = (used.max() + used.min()) / 2, max(0.57 * span, 0.5 * apart * (len(names) + 1))
        axes.set_xlim(middle - half, middle + half)
    axes.yaxis.grid(True, color="#DDDDDD", linewidth=0.5)
    axes.set_axisbelow(True)
    legend_above(figure, axes.get_legend_handles_labels(), columns=columns)
    return figure, table


def _kind(method: str) -> str:
    """A method without the number of its draw."""
    return re.sub(r" \d+$", "", method)


def _methods_in_order(table: pd.DataFrame) -> list[str]:
    """All but the full model: the schedule, its baselines in their order, then whatever else there is."""
    there = [name for name in table.method.unique() if name != "full"]
    known = [name for name in LOOKS if name in there]
    return known + [name for name in there if name not in known]


def _method_label(name: str, schedule: Schedule | None) -> str:
    if name == "schedule" and schedule is not None:
        return f"Schedule ({words(schedule.scorer.name)})"
    return words(_kind(name)).capitalize()
