"""Accuracy on held-out samples, as several figures show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from schedule_finder.evaluation.metrics import DEFAULT_METRIC, metric_label
from schedule_finder.figures.style import GREY
from schedule_finder.intervals import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from schedule_finder.figures.run_data import RunData


@dataclass(frozen=True)
class HeldOut:
    """Accuracy on held-out samples.

    Attributes:
        table: a row per method and budget: ``method, budget, n, processed, value, ci_low, ci_high, measure``, and where
            a method was drawn at random several times ``draws, draw_low, draw_high``, the range over the draws.
        label: of an axis for ``value`` in percent.
    """

    table: pd.DataFrame
    label: str

    @property
    def full(self) -> Any:
        """The full model's row."""
        return self.table[self.table.method == "full"].iloc[0]


def held_out_results(data: RunData) -> HeldOut | None:
    """The metric's score, or agreement with the full model if the data set has no answers."""
    if data.evaluation is None:
        return None
    table = data.evaluation.copy()
    label, centre = "Exact match (%)", "exact_match"
    if "metric" in table and set(table.metric.dropna()) - {DEFAULT_METRIC}:
        name = metric_label(table.metric.iloc[0])
        label, centre = f"{name[0].upper()}{name[1:]} (%)", "score"
        table[["ci_low", "ci_high"]] = table[["score_low", "score_high"]]
    if table.exact_match.isna().all():
        label, centre = "Agreement with full model (%)", "agreement"
        bounds = [
            wilson_interval(round(a * n), int(n)) for a, n in zip(table.agreement, table.n, strict=True)
        ]
        table[["ci_low", "ci_high"]] = bounds
    columns = ["method", "budget", "n", "processed", "value", "ci_low", "ci_high"]
    columns += [name for name in ("draws", "draw_low", "draw_high") if name in table]
    table = table.rename(columns={centre: "value"})[columns].assign(measure=centre)
    return HeldOut(table, label)


def error_bars(rows: pd.DataFrame) -> np.ndarray:
    """Lengths of the interval below and above ``value``, in percent, ``[2, rows]``; of the range over random draws."""
    low, high = rows.ci_low, rows.ci_high
    if several_draws(rows):
        low, high = rows.draw_low.fillna(low), rows.draw_high.fillna(high)
    return 100 * np.maximum([rows.value - low, high - rows.value], 0)


def several_draws(rows: pd.DataFrame) -> bool:
    """Whether some of the rows are means over random draws."""
    return "draws" in rows and bool((rows.draws > 1).any())


def draw_full(axes: Axes, results: HeldOut, *, vertical: bool = False) -> None:
    """The full model as a line with its interval."""
    full = results.full
    span, line = (axes.axvspan, axes.axvline) if vertical else (axes.axhspan, axes.axhline)
    span(100 * full.ci_low, 100 * full.ci_high, color=GREY, alpha=0.18, linewidth=0)
    line(100 * full.value, color=GREY, linewidth=1, label="Full model")
    axes.grid(True, axis="x" if vertical else "y", color="#DDDDDD", linewidth=0.5)
    axes.set_axisbelow(True)
