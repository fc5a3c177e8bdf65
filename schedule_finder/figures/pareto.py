"""The front over budgets: predicted and measured answer change, and accuracy on held-out samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from schedule_finder.figures.held_out import draw_full, error_bars, held_out_results
from schedule_finder.figures.style import (
    BLUE,
    GREY,
    KL_FLOOR,
    SINGLE,
    VERMILLION,
    Drawing,
    kl_axis,
    legend_above,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from schedule_finder.figures.run_data import RunData

# Label, colour, marker, line.
_SERIES = {
    "predicted_change": ("Predicted", VERMILLION, "s", (0, (4, 1.5))),
    "measured_change": ("Measured", BLUE, "o", "-"),
}


def pareto(data: RunData) -> Drawing | None:
    """Answer change against the processed vision tokens; below it, held-out accuracy if it was evaluated."""
    front = data.pareto
    if front is None or front[list(_SERIES)].isna().all(axis=None):
        return None
    front = front.sort_values("processed")
    tables = [
        front[["budget", "processed", "num_stages"]].assign(series=name, value=front[name]).dropna()
        for name in _SERIES
    ]
    columns = ["series", "budget", "processed", "num_stages", "value"]
    results = held_out_results(data)
    heights = (1,) if results is None else (1.4, 1)
    figure = Figure(figsize=(SINGLE, 2.3 if results is None else 3.5), layout="constrained")
    panels = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    _draw_front(panels[0], front)
    if results is not None:
        own = results.table[results.table.method == "schedule"].sort_values("processed")
        tables.append(own.rename(columns={"measure": "series", "ci_low": "low", "ci_high": "high"}))
        columns += ["low", "high"]
        draw_full(panels[1], results)
        x, y = 100 * own.processed, 100 * own.value
        panels[1].errorbar(x, y, error_bars(own), color=BLUE, marker="o", elinewidth=0.7)
        panels[1].set_ylabel(results.label)
    panels[-1].set_xlabel("Vision tokens processed (% of full model)")
    panels[-1].set_xlim(left=0)
    figure.align_ylabels(panels)
    handles = [handle for axes in panels for handle in axes.get_legend_handles_labels()[0]]
    legend_above(figure, handles, columns=2)
    return figure, pd.concat(tables)[columns]


def _draw_front(axes: Axes, front: pd.DataFrame) -> None:
    """Both series, with the number of stages above each point."""
    for name, (label, colour, marker, line) in _SERIES.items():
        rows = front.dropna(subset=name)
        axes.plot(
            100 * rows.processed,
            rows[name].clip(lower=KL_FLOOR),
            color=colour,
            marker=marker,
            linestyle=line,
            label=label if len(rows) else None,
        )
    top = front[list(_SERIES)].max(axis=1).clip(lower=KL_FLOOR)
    for used, value, stages in zip(100 * front.processed, top, front.num_stages, strict=True):
        offset: Any = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center"}
        axes.annotate(str(stages), (used, value), fontsize=6.5, color=GREY, **offset)
    axes.set_ylabel("Answers changed (share)")
    kl_axis(axes, front[list(_SERIES)].to_numpy())
    axes.text(1, 0.97, "Numbers: stages", color=GREY, ha="right", va="top", transform=axes.transAxes)
