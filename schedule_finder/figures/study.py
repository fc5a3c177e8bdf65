"""Figures of the study script: methods by budget for each backbone, and predictions against accuracy."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from schedule_finder.figures.style import BLACK, BLUE, DOUBLE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION

LINES = {
    "sensitivity": ("Search", BLUE, "o", "-"),
    "grid": ("Grid search", BLACK, "x", "--"),
    "sensitivity, not merged": ("Search, discarded", SKY, "P", (0, (5, 1))),
    "paper": ("AdaptInfer layers", VERMILLION, "<", (0, (4, 1.5))),
    "pyramid": ("PyramidDrop layers", GREEN, ">", (0, (4, 1, 1, 1))),
    "fastv": ("FastV", ORANGE, "v", (0, (2, 1))),
    "sparsevlm": ("SparseVLM layers", PURPLE, "^", (0, (6, 1, 1, 1))),
    "its stages, random": ("Search, random tokens", GREY, "X", (0, (1, 1))),
}


def methods_figure(methods: pd.DataFrame) -> Figure:
    """Share of correct first words against the budget, one panel per backbone.

    Args:
        methods: ``backbone, method, budget, right, ci_low, ci_high``, shares in [0, 1].
    """
    names = list(methods.backbone.unique())
    figure = Figure(figsize=(DOUBLE, 3.2), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        some = methods[methods.backbone == name]
        full = 100 * some[some.method == "full"].right.iloc[0]
        panel.axhline(full, color=GREY, linewidth=1, label="Full model")
        for method, (label, colour, marker, line) in LINES.items():
            rows = some[some.method == method].sort_values("budget")
            panel.errorbar(
                100 * rows.budget,
                100 * rows.right,
                [100 * (rows.right - rows.ci_low), 100 * (rows.ci_high - rows.right)],
                color=colour,
                marker=marker,
                linestyle=line,
                markersize=4,
                linewidth=1.2,
                elinewidth=0.8,
                label=label,
            )
        panel.set_title(name, fontsize=9)
        panel.set_xticks(sorted(100 * budget for budget in some.budget.unique() if budget < 1))
        panel.set_xlabel("Vision tokens processed (%)")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("First word correct (%)")
    figure.legend(
        *panels[0][0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    return figure


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
        panel.set_title(f"{name}, rank correlation {rank:.2f}", fontsize=9)
        panel.set_xscale("log")
        panel.set_xlabel("Predicted answer change (share)")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("First word correct (%)")
    return figure
