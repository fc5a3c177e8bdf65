"""Figure of the study of token rules: answer change of every method, a panel per budget."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from schedule_finder.figures.methods import LABELS
from schedule_finder.figures.style import (
    BLACK,
    BLUE,
    DOUBLE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
)

PLACES = {
    "search": (BLUE, "o", "Search"),
    "before the decoder": (GREEN, "D", "One stage before the decoder"),
    "leaving twice": (VERMILLION, "P", "Before the decoder, and all where vision ends"),
    "published": (ORANGE, "s", "Published layers"),
    "searched stages": (GREY, "^", "On the searched stages"),
    "searched stages, merged": (PURPLE, "v", "On the searched stages, merged"),
}
"""Colour, marker and words for where a method's stages come from."""
_SPREAD = 0.8
"""Part of a row's height that its points take."""
_OWN = {"search": "Search", "pyramiddrop": "PyramidDrop"}


def rules_figure(table: pd.DataFrame) -> Figure:
    """Mean answer change with its 95 % interval, one row per rule, one panel per budget.

    Args:
        table: ``method, place, budget, change, change_low, change_high``, shares; a row of the full model is not drawn.
    """
    table = table[table.method != "full"]
    budgets = sorted(table.budget.unique(), reverse=True)
    best = table.groupby("method").change.min().sort_values(ascending=False)
    order = [
        *(name for name in best.index if name != "search"),
        *(name for name in best.index if name == "search"),
    ]
    rows = {name: place for place, name in enumerate(order)}
    places = [place for place in PLACES if (table.place == place).any()]
    # Rows are categories: the points of one rule are below each other, so that none hides another.
    offset = {place: _SPREAD * (0.5 - (i + 0.5) / len(places)) for i, place in enumerate(places)}
    figure = Figure(figsize=(DOUBLE, 0.9 + 0.25 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for panel, budget in zip(panels, budgets, strict=True):
        some = table[table.budget == budget]
        for place in places:
            colour, marker, words = PLACES[place]
            own = some[some.place == place]
            panel.errorbar(
                100 * own.change,
                [rows[name] + offset[place] * (place != "search") for name in own.method],
                xerr=[100 * (own.change - own.change_low), 100 * (own.change_high - own.change)],
                color=colour,
                marker=marker,
                linestyle="none",
                elinewidth=0.7,
                markersize=3.2,
                label=words,
            )
        searched = some[some.place == "search"].change
        if len(searched):
            panel.axvline(100 * float(searched.iloc[0]), color=BLUE, linewidth=0.7, zorder=0)
        panel.set_xlim(left=-2)
        panel.set_title(f"{100 * budget:.0f} % processed", fontsize=8)
        for row in range(1, len(rows), 2):
            panel.axhspan(row - 0.5, row + 0.5, color="#F4F4F4", linewidth=0, zorder=-1)
        panel.set_ylim(-0.6, len(rows) - 0.4)
        panel.tick_params(colors=BLACK, labelsize=7)
    names = [_OWN.get(name) or LABELS.get(name, name) for name in rows]
    panels[0].set_yticks(list(rows.values()), names)
    figure.supxlabel("Answers changed (%)", fontsize=8)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=7,
    )
    return figure
