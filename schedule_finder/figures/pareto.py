"""The front over budgets: what each is predicted, measured and evaluated to cost in quality."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from schedule_finder.figures.evaluation import held_out_results
from schedule_finder.figures.run_data import RunData
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

# Label, colour, marker, line.
_SERIES = {
    "predicted_kl": ("Predicted", VERMILLION, "s", (0, (4, 1.5))),
    "measured_kl": ("Measured", BLUE, "o", "-"),
}


def pareto(data: RunData) -> Drawing | None:
    """KL of the answer token against what is really processed; below it held-out accuracy, where there is any."""
    front = data.pareto
    if front is None or front[list(_SERIES)].isna().all(axis=None):
        return None
    front = front.sort_values("processed")
    tables = [
        front[["budget", "processed", "num_stages"]].assign(series=name, value=front[name]).dropna()
        for name in _SERIES
    ]
    results = held_out_results(data)
    own = None
    if results is not None:
        own = results.table[results.table.method == "schedule"].sort_values("processed")
        tables.append(own.rename(columns={"measure": "series", "ci_low": "low", "ci_high": "high"}))
    columns = ["series", "budget", "processed", "num_stages", "value"]
    table = pd.concat(tables)[columns + (["low", "high"] if own is not None else [])]

    figure = Figure(figsize=(SINGLE, 2.3 if own is None else 3.5), layout="constrained")
    heights = (1,) if own is None else (1.4, 1)
    panels = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    above = panels[0]
    for name, (label, colour, marker, line) in _SERIES.items():
        rows = front.dropna(subset=name)
        above.plot(
            100 * rows.processed,
            rows[name].clip(lower=KL_FLOOR),
            color=colour,
            marker=marker,
            linestyle=line,
            label=label if len(rows) else None,
        )
    top = front[list(_SERIES)].max(axis=1).clip(lower=KL_FLOOR)
    for used, value, stages in zip(100 * front.processed, top, front.num_stages, strict=True):
        above.annotate(
            str(stages), (used, value), xytext=(0, 4), textcoords="offset points", fontsize=6.5, ha="center",
            color=GREY,
        )  # fmt: skip
    above.set_ylabel("KL of answer token (nats)")
    kl_axis(above, front[list(_SERIES)].to_numpy())
    above.text(1, 0.97, "Numbers: stages", color=GREY, ha="right", va="top", transform=above.transAxes)
    if results is not None and own is not None:
        below, full = panels[1], results.full
        below.axhspan(100 * full.ci_low, 100 * full.ci_high, color=GREY, alpha=0.18, linewidth=0)
        below.axhline(100 * full.value, color=GREY, linewidth=1, label="Full model")
        below.errorbar(
            100 * own.processed,
            100 * own.value,
            100 * np.maximum([own.value - own.ci_low, own.ci_high - own.value], 0),
            color=BLUE,
            marker="o",
            elinewidth=0.7,
        )
        below.set_ylabel(results.label)
        below.yaxis.grid(True, color="#DDDDDD", linewidth=0.5)
        below.set_axisbelow(True)
    panels[-1].set_xlabel("Vision tokens processed (% of full model)")
    panels[-1].set_xlim(left=0)
    figure.align_ylabels(panels)
    legend_above(figure, *(axes.get_legend_handles_labels() for axes in panels), columns=2)
    return figure, table
