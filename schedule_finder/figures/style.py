"""What all figures share: sizes, colours, and the pieces that mark layers.

Sizes are those of a two-column paper; colours are Okabe and Ito's, and whatever differs in colour differs in line
or marker too.

Layers are cells, and what happens between two of them stands on the edge: a change point ``l`` at
``l - 0.5``, a stage whose tokens leave after layer ``l`` at ``l + 0.5``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from schedule_finder.figures.run_data import RunData
    from schedule_finder.intervals import Band

Drawing = tuple[Figure, pd.DataFrame]
"""A figure and the table it was drawn from."""

SINGLE, DOUBLE = 3.3, 6.9
"""Widths of one and of two columns, inches."""

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
GREY = "#666666"

# Colour, marker, line of the schedule and of its baselines; those on other layers have open markers.
LOOKS = {
    "schedule": (BLUE, "o", "-"),
    "not merged": (SKY, "P", (0, (5, 1))),
    "last_token": (VERMILLION, "s", (0, (4, 1.5))),
    "uniform_text": (GREEN, "^", (0, (4, 1, 1, 1))),
    "text_guided": (PURPLE, "D", (0, (2, 1))),
    "strided": (ORANGE, "v", (0, (6, 1, 1, 1, 1, 1))),
    "random": (BLACK, "X", (0, (1, 1))),
    "paper": (VERMILLION, "<", (0, (4, 1.5))),
    "pyramid": (GREEN, ">", (0, (4, 1, 1, 1))),
    "random layers": (GREY, "d", (0, (1, 1))),
    "smaller images": (PURPLE, "p", (0, (2, 1))),
}
OPEN = ("paper", "pyramid", "random layers", "smaller images")
SPARE_LOOKS = ((SKY, "P", "-"), (GREY, "*", "--"), (YELLOW, "h", "-."))

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.0,
    "legend.columnspacing": 1.0,
    "legend.labelspacing": 0.3,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "text.parse_math": False,  # a question may hold dollar signs
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
    "figure.constrained_layout.h_pad": 0.02,
    "figure.constrained_layout.w_pad": 0.02,
}


KL_FLOOR = 1e-4
"""Nats: below it nothing is said about answers, and a logarithmic axis ends."""


def kl_axis(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic axis for ``values``, whose lowest line stands for `KL_FLOOR` and everything below it."""
    axes.set_yscale("log")
    largest = float(np.nanmax(values, initial=0))
    axes.set_ylim(KL_FLOOR / 1.5, max(3 * largest, 100 * KL_FLOOR))
    axes.axhline(KL_FLOOR, color="#BBBBBB", linewidth=0.6, zorder=0)
    powers = range(round(np.log10(KL_FLOOR)), 1 + int(np.log10(axes.get_ylim()[1])))
    marks = [10.0**power for power in powers]
    axes.set_yticks(marks, [f"\u2264 {KL_FLOOR:g}", *(f"{mark:g}" for mark in marks[1:])])
    axes.yaxis.set_minor_locator(NullLocator())


def layer_axis(axes: Axes, num_layers: int, label: str = "Decoder layer") -> None:
    """Whole layers along the lower edge."""
    axes.set_xlim(-0.5, num_layers - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, steps=[1, 2, 4, 5, 10]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def draw_curve(
    axes: Axes, x: np.ndarray, curve: Band, colour: str, marker: str, line: Any, label: str | None = None
) -> None:
    """A line with its confidence band."""
    axes.fill_between(x, curve.low, curve.high, color=colour, alpha=0.25, linewidth=0)
    size = 3.0 if len(x) <= 16 else 2.0
    axes.plot(x, curve.mean, color=colour, marker=marker, markersize=size, linestyle=line, label=label)


def mark_layers(
    figure: Figure,
    panels: Sequence[Axes],
    data: RunData,
    more: Sequence[Any] = (),
    columns: int = 2,
    title: str | None = None,
) -> None:
    """Change points as dashed lines, stages as triangles on the lower edge; a legend above."""
    handles = list(more)
    for axes in panels:
        for layer in data.change_points:
            axes.axvline(layer - 0.5, color=VERMILLION, linestyle=(0, (3, 1.5)), linewidth=1.1)
    for stage in data.stages:
        panels[-1].plot(
            stage.layer + 0.5,
            0,
            marker="^",
            color=BLACK,
            markersize=5,
            clip_on=False,
            zorder=5,
            transform=panels[-1].get_xaxis_transform(),
        )
    if data.change_points:
        handles.append(
            Line2D([], [], color=VERMILLION, linestyle=(0, (3, 1.5)), linewidth=1.1, label="Change point")
        )
    if data.stages:
        handles.append(
            Line2D([], [], color=BLACK, marker="^", markersize=5, linestyle="", label="Tokens leave")
        )
    if handles:
        legend_above(
            figure, (handles, [str(handle.get_label()) for handle in handles]), columns=columns, title=title
        )


def legend_above(
    figure: Figure, *entries: tuple[list[Any], list[Any]], columns: int, title: str | None = None
) -> None:
    """One legend above the panels for the handles and labels of all of them, each label once."""
    once = {
        label: handle for handles, labels in entries for handle, label in zip(handles, labels, strict=True)
    }
    figure.legend(
        list(once.values()),
        list(once),
        loc="outside upper center",
        ncols=columns,
        title=title,
        title_fontsize=7,
    )


def words(name: str) -> str:
    """A name as it is read."""
    return name.replace("_", " ")
