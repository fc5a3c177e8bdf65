"""Retention per benchmark: what each method keeps of the full model's score on each task of lmms-eval."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from schedule_finder.figures import save_figure
from schedule_finder.figures.methods import METHOD_STYLES, SPARE, base_of, is_discarded, method_label
from schedule_finder.figures.style import (
    DOUBLE,
    GREY,
    SINGLE,
    STYLES,
    legend_above,
    words,
)

MEAN = "mean of the tasks"
_COLUMNS = 3
"""Most panels side by side."""


def write_task_retention(table: pd.DataFrame, stem: Path) -> list[Path]:
    """Draw `task_retention` as PDF and PNG with its table; no files where no task has a retention."""
    with matplotlib.rc_context(STYLES["screen"]):
        drawn = task_retention(table)
        return [] if drawn is None else save_figure(stem, *drawn)


def task_retention(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame] | None:
    """One row per task and one for their mean, one panel per schedule, one marker per method.

    Args:
        table: of `benchmark_table`; the main metric of each task is drawn.
    """
    shown = _shown(table)
    if shown.empty:
        return None
    schedules = list(dict.fromkeys(shown.schedule))
    tasks = [*dict.fromkeys(task for task in shown.task if task != MEAN), MEAN][: shown.task.nunique()]
    methods = list(dict.fromkeys(shown.baseline))
    columns = min(len(schedules), _COLUMNS)
    lines = math.ceil(len(schedules) / columns)
    height = 0.7 + lines * (0.3 + len(tasks) * max(0.22, 0.06 + 0.085 * len(methods)))
    figure = Figure(figsize=(SINGLE if columns == 1 else DOUBLE, height), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    handles = []
    for panel, schedule in zip(panels, schedules, strict=False):
        handles += _draw(panel, shown[shown.schedule == schedule], tasks, methods)
        if columns > 1:
            panel.set_title(schedule, fontsize=7.5)
    for panel in panels[len(schedules) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(schedules) - columns) : len(schedules)]:
        panel.set_xlabel("Retention (%), 95% interval (items)")
        panel.tick_params(labelbottom=True)
    counts = shown.groupby("task").n.max()
    prefix = _common_prefix([task for task in tasks if task != MEAN])
    labels = [
        f"Mean ({len(tasks) - 1} tasks)"
        if task == MEAN
        else f"{words(task.removeprefix(prefix))} ({counts[task]:.0f})"
        for task in tasks
    ]
    panels[0].set_yticks(range(len(tasks)), labels)
    panels[0].set_ylim(len(tasks) - 0.5, -0.5)
    legend_above(figure, handles, columns=2 if columns == 1 else 4)
    return figure, shown


def _draw(panel: Axes, own: pd.DataFrame, tasks: list[str], methods: list[str]) -> list[Any]:
    """The methods of one schedule; returns handles for the legend."""
    panel.axvline(100, color=GREY, linewidth=1, linestyle=(0, (3, 1.5)), zorder=1)
    if tasks[-1] == MEAN:
        panel.axhline(len(tasks) - 1.5, color="#BBBBBB", linewidth=0.6)
    handles = []
    for number, method in enumerate(methods):
        rows = own[own.baseline == method].set_index("task").reindex(tasks)
        middle, low, high = (100 * rows[name] for name in ("retention", "retention_low", "retention_high"))
        colour, marker, label = _look(method, number)
        offset = (number - (len(methods) - 1) / 2) * 0.7 / max(1, len(methods))
        bars = np.nan_to_num(np.maximum([middle - low, high - middle], 0))
        handles.append(
            panel.errorbar(
                middle,
                np.arange(len(tasks)) + offset,
                xerr=bars,
                fmt=marker,
                color=colour,
                markerfacecolor="white" if is_discarded(method.replace("-", " ")) else colour,
                markersize=3.5,
                elinewidth=0.7,
                label=label,
            )
        )
    panel.grid(True, axis="x", color="#DDDDDD", linewidth=0.5)
    panel.set_axisbelow(True)
    return handles


def _look(method: str, number: int) -> tuple[str, str, str]:
    """Colour, marker and label of the schedule ("") or of a baseline."""
    name = method.replace("-", " ") or "schedule"
    colour, marker, _ = METHOD_STYLES.get(base_of(name), SPARE[number % len(SPARE)])
    return colour, marker, method_label(name, None)


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """The main metric of each task without the full model, and the mean over the tasks."""
    own = table[table.main & table.retention.notna() & (table.baseline != "full")]
    names = [
        method.removesuffix(f"-{baseline}") if baseline else method
        for method, baseline in zip(own.method, own.baseline, strict=True)
    ]
    columns = ["task", "metric", "n", "schedule", "baseline", "retention", "retention_low", "retention_high"]
    own = own.assign(schedule=names)[columns]
    if own.task.nunique() < 2:
        return own
    mean = own.groupby(["schedule", "baseline"], sort=False).retention.mean().reset_index().assign(task=MEAN)
    return pd.concat([own, mean], ignore_index=True)[columns]


def _common_prefix(tasks: list[str]) -> str:
    """What all names begin with, up to an underscore; empty where they share nothing."""
    if len(tasks) < 2:
        return ""
    least, most = min(tasks), max(tasks)
    same = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))
    return least[: least.rfind("_", 0, same) + 1]
