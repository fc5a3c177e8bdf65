"""Accuracy against the measured time of the prefill."""

from __future__ import annotations

from typing import TYPE_CHECKING

from schedule_finder.figures.held_out import draw_full, error_bars, held_out_results
from schedule_finder.figures.methods import draw_panels, method_looks
from schedule_finder.figures.style import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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

    def draw(axes: Axes, names: list[str]) -> None:
        draw_full(axes, results)
        axes.axvline(100, color="#BBBBBB", linewidth=0.6, zorder=0)
        for name in names:
            rows = table[table.method == name].sort_values("time_share")
            axes.errorbar(
                100 * rows.time_share, 100 * rows.value, error_bars(rows), **looks[name] | {"linestyle": ""}
            )

    labels = ("Measured prefill time of the decoder (% of full)", results.label)
    return draw_panels(looks, labels, draw), table
