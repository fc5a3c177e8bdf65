"""Sizes, colours, legends and layer marks of all figures.

Sizes are those of a two-column paper. Colours are those of Okabe and Ito; series of different colour also have
different lines or markers.

A layer covers one unit of the axis, centred at its index. A change point ``l`` is drawn at ``l - 0.5``, a stage after
layer ``l`` at ``l + 0.5``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
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
GAP = "#E8E8E8"
"""Layers without data."""

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
    "hatch.linewidth": 0.5,
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


PAPER: dict[Any, Any] = STYLE | {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
}
"""A serif as in the text of a paper; matplotlib brings it."""

STYLES = {"screen": STYLE, "paper": PAPER}


KL_FLOOR = 1e-4
"""Nats. Smaller values do not change answers; logarithmic axes end here."""


def kl_axis(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic axis for ``values``; its lowest tick stands for `KL_FLOOR` and everything below it."""
    axes.set_yscale("log")
    largest = float(np.nanmax(values, initial=0))
    axes.set_ylim(KL_FLOOR / 1.5, max(3 * largest, 100 * KL_FLOOR))
    axes.axhline(KL_FLOOR, color="#BBBBBB", linewidth=0.6, zorder=0)
    powers = range(round(np.log10(KL_FLOOR)), 1 + int(np.log10(axes.get_ylim()[1])))
    marks = [10.0**power for power in powers]
    axes.set_yticks(marks, [f"\u2264 {KL_FLOOR:g}", *(f"{mark:g}" for mark in marks[1:])])
    axes.yaxis.set_minor_locator(NullLocator())


def layer_axis(axes: Axes, num_layers: int, label: str = "Decoder layer") -> None:
    """Layer indices along the lower edge."""
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


def mark_layers(panels: Sequence[Axes], data: RunData) -> list[Line2D | Patch]:
    """Draw change points as dashed lines, stages as triangles, and layers without a profile in grey.

    Returns the handles for a legend.
    """
    handles: list[Line2D | Patch] = []
    line: dict[str, Any] = {"color": VERMILLION, "linestyle": (0, (3, 1.5)), "linewidth": 1.1}
    triangle: dict[str, Any] = {"color": BLACK, "marker": "^", "markersize": 5, "linestyle": ""}
    if data.change_points:
        handles.append(Line2D([], [], label="Change point", **line))
    if data.stages:
        handles.append(Line2D([], [], label="Tokens are dropped", **triangle))
    if data.layers_without_profile:
        handles.append(Patch(color=GAP, label="No profile"))
    for axes in panels:
        for layer in data.change_points:
            axes.axvline(layer - 0.5, **line)
        for layer in data.layers_without_profile:
            axes.axvspan(layer - 0.5, layer + 0.5, color=GAP, linewidth=0, zorder=0)
    edge = panels[-1].get_xaxis_transform()
    for stage in data.stages:
        panels[-1].plot(stage.layer + 0.5, 0, clip_on=False, zorder=5, transform=edge, **triangle)
    return handles


def labelled(handles: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """The arguments of a legend."""
    return list(handles), [str(handle.get_label()) for handle in handles]


def legend_above(figure: Figure, handles: Sequence[Any], *, columns: int, title: str | None = None) -> None:
    """One legend above all panels; handles of the same label appear once."""
    once = {str(handle.get_label()): handle for handle in handles}
    if once:
        figure.legend(
            *labelled(list(once.values())),
            loc="outside upper center",
            ncols=columns,
            title=title,
            title_fontsize=7,
        )


def legend_over(axes: Axes, handles: Sequence[Any], *, columns: int, title: str | None = None) -> None:
    """A legend of one panel, directly above it; ``title`` is the panel's, in bold above the legend."""
    legend = axes.legend(
        *labelled(handles),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        borderaxespad=0.2,
        title=title,
        title_fontproperties={"weight": "bold", "size": 7.5},
        alignment="left",
    )
    legend.set_zorder(10)


def words(name: str) -> str:
    """``name`` with spaces."""
    return name.replace("_", " ")
