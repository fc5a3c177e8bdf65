"""Accuracy of the schedule and its baselines on held-out samples."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from schedule_finder.figures.held_out import HeldOut, draw_full, error_bars, held_out_results, several_draws
from schedule_finder.figures.style import (
    LABELS,
    METHOD_STYLES,
    OPEN,
    SINGLE,
    SPARE_STYLES,
    Drawing,
    legend_above,
    words,
)

if TYPE_CHECKING:
    import pandas as pd

    from pruning_runtime.schedule import Schedule
    from schedule_finder.figures.run_data import RunData


def accuracy(data: RunData) -> Drawing | None:
    """Accuracy against the processed vision tokens; at a single budget, accuracy by method."""
    results = held_out_results(data)
    if results is None:
        return None
    styles = method_looks(results, data.schedule)
    one_budget = results.table.budget[results.table.method != "full"].nunique() <= 1
    draw = _by_method if one_budget else _by_budget
    return draw(results, styles), results.table


def method_looks(results: HeldOut, schedule: Schedule | None) -> dict[str, dict[str, Any]]:
    """Colour, marker, line and label of each method but the full model, in their order."""
    names, spare = _methods_in_order(results.table), iter(SPARE_STYLES * len(results.table))
    used = {kind: METHOD_STYLES.get(kind) or next(spare) for kind in dict.fromkeys(map(_kind, names))}
    styles = {name: _style(name, *used[_kind(name)], schedule) for name in names}
    for name, style in styles.items():
        if several_draws(rows := results.table[results.table.method == name]):
            style["label"] += f" (range of {int(rows.draws.max())})"
    return styles


def _by_budget(results: HeldOut, styles: dict[str, dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(SINGLE, 2.2 + 0.065 * (len(styles) + 1)), layout="constrained")
    axes = figure.subplots()
    draw_full(axes, results)
    for name, style in styles.items():
        rows = results.table[results.table.method == name].sort_values("processed")
        axes.errorbar(100 * rows.processed, 100 * rows.value, error_bars(rows), **style)
    axes.set_xlabel("Vision tokens processed (% of full model)")
    axes.set_ylabel(results.label)
    legend_above(figure, axes.get_legend_handles_labels()[0], columns=2)
    return figure


def _by_method(results: HeldOut, styles: dict[str, dict[str, Any]]) -> Figure:
    labels = list(dict.fromkeys(style["label"] for style in styles.values()))
    figure = Figure(figsize=(SINGLE, 0.75 + 0.17 * len(labels)), layout="constrained")
    axes = figure.subplots()
    draw_full(axes, results, vertical=True)
    for name, style in styles.items():
        rows = results.table[results.table.method == name]
        row = [labels.index(style["label"])] * len(rows)
        axes.errorbar(100 * rows.value, row, xerr=error_bars(rows), **style | {"linestyle": ""})
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(results.label)
    if labels:
        used = results.table.processed[results.table.method == "schedule"]
        title = f"Schedule: {used.iloc[0]:.1%} of the vision tokens processed" if len(used) else None
        legend_above(figure, [axes.get_lines()[0]], columns=1, title=title)
    return figure


def _style(name: str, colour: str, marker: str, line: Any, schedule: Schedule | None) -> dict[str, Any]:
    is_open = _kind(name) in OPEN
    return {
        "color": colour,
        "marker": marker,
        "markeredgecolor": colour if is_open else "white",
        "markerfacecolor": "white" if is_open else colour,
        "markeredgewidth": 0.8 if is_open else 0.3,
        "markersize": 4.5,
        "linestyle": line,
        "elinewidth": 0.7,
        "zorder": 4 if name == "schedule" else 3,
        "label": _method_label(name, schedule),
    }


def _kind(method: str) -> str:
    """A method without the number of its draw."""
    return re.sub(r" \d+$", "", method)


def _methods_in_order(table: pd.DataFrame) -> list[str]:
    """All but the full model: those of `METHOD_STYLES` in its order, then the others."""
    there = [name for name in table.method.unique() if name != "full"]
    known = [name for name in METHOD_STYLES if name in there]
    return known + [name for name in there if name not in known]


def _method_label(name: str, schedule: Schedule | None) -> str:
    if name == "schedule" and schedule is not None:
        return f"Schedule ({words(schedule.scorer.name)})"
    kind = _kind(name)
    return LABELS.get(kind) or words(kind).capitalize()
