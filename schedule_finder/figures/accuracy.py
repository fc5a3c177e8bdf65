"""Accuracy of the schedule and its baselines on held-out samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from schedule_finder.figures.held_out import HeldOut, draw_full, error_bars, held_out_results
from schedule_finder.figures.methods import (
    base_of,
    draw_panels,
    is_discarded,
    merging_handles,
    method_looks,
)
from schedule_finder.figures.style import SINGLE, Drawing, legend_above
from schedule_finder.measuring.token_policy import NOT_MERGED_SUFFIX

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from schedule_finder.figures.run_data import RunData


def accuracy(data: RunData) -> Drawing | None:
    """Accuracy against the processed vision tokens; at a single budget, accuracy by method."""
    results = held_out_results(data)
    if results is None:
        return None
    looks = method_looks(results, data.schedule)
    one_budget = results.table.budget[results.table.method != "full"].nunique() <= 1
    draw = _by_method if one_budget else _by_budget
    return draw(results, looks), results.table


def _by_budget(results: HeldOut, looks: dict[str, dict[str, Any]]) -> Figure:
    """Lines over budgets; many methods have a panel for each group."""

    def draw(axes: Axes, names: list[str]) -> None:
        draw_full(axes, results)
        for name in names:
            rows = results.table[results.table.method == name].sort_values("processed")
            axes.errorbar(100 * rows.processed, 100 * rows.value, error_bars(rows), **looks[name])

    return draw_panels(looks, ("Vision tokens processed (% of full model)", results.label), draw)


def _by_method(results: HeldOut, looks: dict[str, dict[str, Any]]) -> Figure:
    """One row per method; below a method's point, that of the same method with its dropped tokens discarded."""
    label_of = {base_of(name): look["label"].replace(NOT_MERGED_SUFFIX, "") for name, look in looks.items()}
    place = {base: row for row, base in enumerate(label_of)}
    both = any(map(is_discarded, looks))
    high = 0.24 if both else 0.17
    figure = Figure(figsize=(SINGLE, 0.75 + 0.17 * both + high * len(place)), layout="constrained")
    axes = figure.subplots()
    draw_full(axes, results, vertical=True)
    for name, look in looks.items():
        rows = results.table[results.table.method == name]
        # Rows are categories: the two points of a method are side by side.
        offset = (0.18 if is_discarded(name) else -0.18) if both else 0.0
        row = [place[base_of(name)] + offset] * len(rows)
        axes.errorbar(100 * rows.value, row, xerr=error_bars(rows), **look | {"linestyle": ""})
    axes.set_yticks(range(len(place)), list(label_of.values()))
    axes.set_ylim(len(place) - 0.5, -0.5)
    axes.set_xlabel(results.label)
    if place:
        used = results.table.processed[results.table.method == "schedule"]
        title = f"Schedule: {used.iloc[0]:.1%} of the vision tokens processed" if len(used) else None
        handles = [axes.get_lines()[0], *(_without_line(one) for one in merging_handles() if both)]
        legend_above(figure, handles, columns=1, title=title)
    return figure


def _without_line(handle: Any) -> Any:
    handle.set_linestyle("")
    return handle
