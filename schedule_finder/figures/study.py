"""Figures of the study script: methods by budget for each backbone, and predictions against accuracy.

Filled markers: dropped tokens are merged into kept ones. Open markers: dropped tokens are discarded.
"""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from schedule_finder.figures.style import BLACK, BLUE, DOUBLE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION

LINES: dict[str, tuple[str, str, str, bool]] = {
    "sensitivity": ("Search", BLUE, "o", True),
    "sensitivity, not merged": ("Search", BLUE, "o", False),
    "grid": ("Grid search, rule of the search", BLACK, "D", True),
    "its stages, random": ("Random tokens, stages of the search", GREY, "X", True),
    "paper, merged": ("AdaptInfer", VERMILLION, "<", True),
    "paper": ("AdaptInfer", VERMILLION, "<", False),
    "pyramid, merged": ("PyramidDrop", GREEN, ">", True),
    "pyramid": ("PyramidDrop", GREEN, ">", False),
    "fastv, merged": ("FastV", ORANGE, "v", True),
    "fastv": ("FastV", ORANGE, "v", False),
    "sparsevlm, merged": ("SparseVLM", PURPLE, "^", True),
    "sparsevlm": ("SparseVLM", PURPLE, "^", False),
    "vtw": ("VTW", SKY, "s", False),
}
"""Method of the table -> name for a reader, colour, marker, whether dropped tokens are merged."""


def methods_figure(methods: pd.DataFrame) -> Figure:
    """Share of correct first words against the budget, one panel per backbone.

    Args:
        methods: ``backbone, method, budget, right, ci_low, ci_high``, shares in [0, 1].
    """
    names = list(methods.backbone.unique())
    figure = Figure(figsize=(DOUBLE, 3.5), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        some = methods[methods.backbone == name]
        full = 100 * some[some.method == "full"].right.iloc[0]
        panel.axhline(full, color=GREY, linewidth=1)
        for method, (_, colour, marker, merged) in LINES.items():
            rows = some[some.method == method].sort_values("budget")
            look = _look(colour, marker, merged)
            bars = [100 * (rows.right - rows.ci_low), 100 * (rows.ci_high - rows.right)]
            panel.errorbar(100 * rows.budget, 100 * rows.right, bars, elinewidth=0.8, **look)
        panel.set_title(_backbone(name), fontsize=9)
        panel.set_xticks(sorted(100 * budget for budget in some.budget.unique() if budget < 1))
        panel.set_xlabel("Vision tokens processed (%)")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("First word correct (%)")
    figure.legend(
        handles=_handles(set(methods.method)), loc="outside upper center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def _look(colour: str, marker: str, merged: bool) -> dict[str, Any]:
    return {
        "color": colour,
        "marker": marker,
        "markersize": 4,
        "markerfacecolor": colour if merged else "white",
        "linestyle": "-" if merged else (0, (2, 1.5)),
        "linewidth": 1.2,
    }


def _handles(drawn: set[str]) -> list[Line2D]:
    """The legend of the methods ``drawn``: a name for each colour, and what filled and open markers mean."""
    looks = [look for method, look in LINES.items() if method in drawn]
    handles = [Line2D([], [], color=GREY, linewidth=1, label="Full model")]
    for label in dict.fromkeys(look[0] for look in looks):
        colour, marker, merged = max(look[1:] for look in looks if look[0] == label)
        look = _look(colour, marker, merged) | {"linestyle": ""}
        handles.append(Line2D([], [], label=label, **look))
    for merged, label in ((True, "Dropped tokens merged"), (False, "Dropped tokens discarded")):
        handles.append(Line2D([], [], label=label, **_look(BLACK, "o", merged)))
    return handles


def _backbone(name: str) -> str:
    """``depth8`` in words; other names as they are."""
    depth = re.fullmatch(r"depth(\d+)", name)
    return f"{depth[1]} decoder layers" if depth else name


def predictions_figure(predictions: pd.DataFrame) -> Figure:
    """Predicted answer change of random schedules against their accuracy, one panel per backbone.

    Args:
        predictions: ``backbone, predicted_change, right``.
    """
    names = list(predictions.backbone.unique())
    figure = Figure(figsize=(DOUBLE, 2.4), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        some = predictions[predictions.backbone == name]
        panel.scatter(some.predicted_change.clip(lower=1e-4), 100 * some.right, s=10, color=BLUE)
        rank = some.predicted_change.corr(some.right, method="spearman")
        panel.set_title(f"{_backbone(name)}, rank correlation {rank:.2f}", fontsize=9)
        panel.set_xscale("log")
        panel.set_xlabel("Predicted answer change (share)")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("First word correct (%)")
    return figure
