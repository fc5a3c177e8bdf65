"""Names, colours and groups of the methods that an evaluation compares.

Filled markers: dropped tokens are merged, or the schedule discards them too. Open markers: the same method with its
dropped tokens discarded.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from schedule_finder.figures.held_out import several_draws
from schedule_finder.figures.style import (
    BLACK,
    BLUE,
    DOUBLE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SINGLE,
    SKY,
    VERMILLION,
    YELLOW,
    legend_above,
    legend_over,
    words,
)
from schedule_finder.measuring.token_policy import NOT_MERGED_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

    from pruning_runtime.schedule import Schedule
    from schedule_finder.figures.held_out import HeldOut

OWN_NOT_MERGED = "not merged"
"""The schedule with its dropped tokens discarded, as the evaluation calls it."""
_DASHED, _DOTS, _DASH_DOT, _SHORT = (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (2, 1))
GROUPS: dict[str, dict[str, tuple[str, str, Any]]] = {
    "Controls and other layers": {
        "strided": (ORANGE, "v", (0, (6, 1, 1, 1, 1, 1))),
        "random": (BLACK, "X", _DOTS),
        "paper": (SKY, "<", _DASHED),
        "pyramid": (GREEN, ">", _DASH_DOT),
        "random layers": (GREY, "d", _DOTS),
        "smaller images": (PURPLE, "p", _SHORT),
    },
    "Attention in the decoder": {
        "last_token": (VERMILLION, "s", _DASHED),
        "uniform_text": (GREEN, "^", _DASH_DOT),
        "text_guided": (PURPLE, "D", _SHORT),
        "sparsevlm": (ORANGE, "s", (0, (6, 1, 1, 1))),
    },
    "Hidden states": {
        "divprune": (GREEN, "o", "-"),
        "cdpruner": (VERMILLION, "D", _DASHED),
        "mmtok": (PURPLE, "s", _SHORT),
        "dart": (ORANGE, "D", _DASH_DOT),
        "v2drop": (BLACK, "P", _DOTS),
        "evs": (GREY, "o", _DASHED),
        "vidcom2": (SKY, "s", _SHORT),
    },
    "Vision tower": {
        "fastervlm": (VERMILLION, "o", _DASHED),
        "hiprune": (GREEN, "s", _DASH_DOT),
        "visionzip": (PURPLE, "v", _SHORT),
        "scope": (ORANGE, "^", "-"),
        "vscan": (BLACK, "D", _DOTS),
    },
}
"""Colour, marker and line of each baseline, by what it reads. Two baselines of a group differ in colour and marker."""
METHOD_STYLES = {"schedule": (BLUE, "o", "-")} | {
    name: look for group in GROUPS.values() for name, look in group.items()
}
LABELS = {
    "last_token": "Last token (FastV)",
    "uniform_text": "Uniform text",
    "text_guided": "Text guided (AdaptInfer)",
    "sparsevlm": "SparseVLM",
    "divprune": "DivPrune",
    "cdpruner": "CDPruner",
    "mmtok": "MMTok",
    "dart": "DART",
    "v2drop": "V2Drop",
    "fastervlm": "FasterVLM",
    "hiprune": "HiPrune",
    "visionzip": "VisionZip",
    "scope": "SCOPE",
    "vscan": "VScan",
    "evs": "EVS",
    "vidcom2": "VidCom2",
    "strided": "Evenly spaced tokens",
    "random": "Random tokens",
    "paper": "Layers of AdaptInfer",
    "pyramid": "Layers of PyramidDrop",
}
"""Names of methods where a reader needs more than the name in the table."""
SPARE = ((SKY, "P", "-"), (GREY, "*", "--"), (YELLOW, "h", "-."))
"""Colour, marker and line of methods without a look of their own."""
_MOST_IN_ONE_PANEL = 8
_OTHERS = "Others"


def base_of(method: str) -> str:
    """A method without what tells its variants apart: merging, and the number of a draw."""
    if method == OWN_NOT_MERGED:
        return "schedule"
    return re.sub(r" \d+$", "", method.removesuffix(NOT_MERGED_SUFFIX))


def is_discarded(method: str) -> bool:
    """Whether the method discards its dropped tokens where the schedule merges them."""
    return method == OWN_NOT_MERGED or method.endswith(NOT_MERGED_SUFFIX)


def base_label(method: str, schedule: Schedule | None) -> str:
    """The name of a method for a reader, without its merging."""
    base = base_of(method)
    if base == "schedule" and schedule is not None:
        return f"Schedule ({words(schedule.scorer.name)})"
    return LABELS.get(base) or words(base).capitalize()


def method_label(method: str, schedule: Schedule | None) -> str:
    """The name of a method for a reader."""
    if method == "full":
        return "Full model"
    return base_label(method, schedule) + (NOT_MERGED_SUFFIX if is_discarded(method) else "")


def method_looks(results: HeldOut, schedule: Schedule | None) -> dict[str, dict[str, Any]]:
    """Colour, marker, line and label of each method but the full model; known ones first, variants side by side."""
    names = [name for name in results.table.method.unique() if name != "full"]
    known = list(METHOD_STYLES)
    rank = {base: known.index(base) if base in known else len(known) for base in map(base_of, names)}
    spare = iter(SPARE * len(names))
    used = {base: METHOD_STYLES.get(base) or next(spare) for base in dict.fromkeys(map(base_of, names))}
    looks = {}
    for name in sorted(names, key=lambda name: (rank[base_of(name)], base_of(name), is_discarded(name))):
        looks[name] = _look(name, *used[base_of(name)]) | {"label": method_label(name, schedule)}
        if several_draws(rows := results.table[results.table.method == name]):
            looks[name]["label"] += f" ({int(rows.draws.max())} draws)"
    return looks


def _look(name: str, colour: str, marker: str, line: Any) -> dict[str, Any]:
    discarded = is_discarded(name)
    return {
        "color": colour,
        "marker": marker,
        "markeredgecolor": colour if discarded else "white",
        "markerfacecolor": "white" if discarded else colour,
        "markeredgewidth": 0.8 if discarded else 0.3,
        "markersize": 4.5,
        "linestyle": (0, (1, 1.5)) if discarded else line,
        "linewidth": 0.9 if discarded else 1.2,
        "elinewidth": 0.7,
        "zorder": 4 if name == "schedule" else 3,
    }


def grouped(names: list[str]) -> dict[str, list[str]]:
    """The methods of each panel by its title; one panel without a title where they fit into it.

    The schedule, merged or not, is in every panel.
    """
    if len({base_of(name) for name in names}) <= _MOST_IN_ONE_PANEL:
        return {"": names}
    group_of = {base: title for title, bases in GROUPS.items() for base in bases}
    own = [name for name in names if base_of(name) == "schedule"]
    found = {
        title: [name for name in names if name not in own and group_of.get(base_of(name), _OTHERS) == title]
        for title in (*GROUPS, _OTHERS)
    }
    return {title: [*own, *some] for title, some in found.items() if some}


def draw_panels(
    looks: dict[str, dict[str, Any]],
    labels: tuple[str, str],
    draw: Callable[[Axes, list[str]], None],
) -> Figure:
    """A figure of one panel with a legend above, or of a panel per group with its own legend.

    Args:
        looks: of `method_looks`.
        labels: of the horizontal and of the vertical axis.
        draw: draws the methods named into a panel.
    """
    panels = grouped(list(looks))
    discarded = any(map(is_discarded, looks))
    if len(panels) == 1:
        figure = Figure(figsize=(SINGLE, 2.2 + 0.065 * (len(looks) + 1)), layout="constrained")
        axes = figure.subplots()
        draw(axes, list(looks))
        axes.set(xlabel=labels[0], ylabel=labels[1])
        legend_above(figure, [*_without_variants(axes), *(merging_handles() if discarded else ())], columns=2)
        return figure
    down, most = -(-len(panels) // 2), max(map(len, panels.values()))
    figure = Figure(figsize=(DOUBLE, (2.0 + 0.07 * most) * down + 0.2), layout="constrained")
    grid = np.ravel(figure.subplots(down, 2, sharex=True, sharey=True, squeeze=False))
    for axes, (title, names) in zip(grid, panels.items(), strict=False):
        draw(axes, names)
        legend_over(axes, _without_variants(axes), columns=2, title=title)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel(labels[0], fontsize=7.5)
    figure.supylabel(labels[1], fontsize=7.5)
    if discarded:
        legend_above(figure, merging_handles(), columns=2)
    return figure


def _without_variants(axes: Axes) -> list[Any]:
    """Legend handles of a panel without those of methods that are there a second time without merging."""
    handles = axes.get_legend_handles_labels()[0]
    return [handle for handle in handles if NOT_MERGED_SUFFIX not in str(handle.get_label())]


def merging_handles() -> list[Line2D]:
    """What filled and open markers mean, for a legend."""
    look: dict[str, Any] = {"color": GREY, "marker": "o", "markersize": 4.5, "linestyle": "-"}
    return [
        Line2D([], [], label="Dropped tokens merged", **look),
        Line2D(
            [],
            [],
            label="Dropped tokens discarded",
            **look | {"markerfacecolor": "white", "linestyle": (0, (1, 1.5))},
        ),
    ]
