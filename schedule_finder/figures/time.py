"""Accuracy against the measured time of the prefill."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from schedule_finder.figures.accuracy import method_looks
from schedule_finder.figures.held_out import draw_full, error_bars, held_out_results
from schedule_finder.figures.style import SINGLE, Drawing, legend_above

if TYPE_CHECKING:
    from schedule_finder.figures.run_data import RunData


def accuracy_by_time(data: RunData) -> Drawing | None:
    """Score against the decoder's prefill time, as a share of the full model's; None without measured times."""
    results = held_out_results(data)
    if results is None or data.evaluation is None or "prefill_ms" not in data.evaluation:
        return None
    table = results.table.assign(prefill_ms=data.evaluation.prefill_ms.to_numpy())
    full = table[table.method == "full"].prefill_ms.iloc[0]
    if not full > 0 or table.prefill_ms.isna().all():
        return None
    table["time_share"] = table.prefill_ms / full
    looks = method_looks(results, data.schedule)
    figure = Figure(figsize=(SINGLE, 2.2 + 0.065 * (len(looks) + 1)), layout="constrained")
    axes = figure.subplots()
    draw_full(axes, results)
    for name, look in looks.items():
        rows = table[table.method == name].sort_values("time_share")
        axes.errorbar(100 * rows.time_share, 100 * rows.value, error_bars(rows), **look | {"linestyle": ""})
    axes.axvline(100, color="#BBBBBB", linewidth=0.6, zorder=0)
    axes.set_xlabel("Time of the decoder's prefill (% of full model)")
    axes.set_ylabel(results.label)
    legend_above(figure, axes.get_legend_handles_labels()[0], columns=2)
    return figure, table
