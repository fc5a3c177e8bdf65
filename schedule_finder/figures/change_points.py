"""Where the cumulative curves of single tokens break, beside a profile without any shift."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from schedule_finder.errors import InputError
from schedule_finder.figures.run_data import need
from schedule_finder.figures.style import (
    BLACK,
    SINGLE,
    SKY,
    VERMILLION,
    Drawing,
    layer_axis,
    legend_above,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from schedule_finder.figures.run_data import RunData


def change_points(data: RunData) -> Drawing | None:
    """Breaks of the tokens' cumulative curves by layer, beside those of shuffled layers."""
    if data.detections is None:
        return None
    path, detectors = data.run.change_points, data.detections.detectors
    evidence = detectors["token_curve"].evidence if "token_curve" in detectors else {}
    if not evidence or "reason" in evidence:  # not run, or too few layers for it
        return None
    need(evidence, ("histogram", "straight_ramp", "num_curves"), path, "detect again")
    layers = data.detections.layers or list(range(len(evidence["histogram"])))
    # Entry i counts breaks after the i-th layer: the new regime begins with the next one.
    first = np.array(layers[1:])

    def percent(counts: Sequence[float]) -> np.ndarray:
        if len(counts) != len(layers):
            raise InputError(f"{path}: {len(counts)} numbers for {len(layers)} layers; detect again")
        return np.asarray(100 * np.array(counts[:-1], dtype=float) / evidence["num_curves"])

    table = pd.DataFrame(
        {"first_layer_of_new_regime": first, "breaks_percent": percent(evidence["histogram"])}
    )
    table["straight_ramp_percent"] = percent(evidence["straight_ramp"])
    if "shuffled_layers" in evidence:
        table["shuffled_layers_percent"] = percent(evidence["shuffled_layers"])
        table["threshold_percent"] = table.shuffled_layers_percent + 100 * evidence["excess_threshold"]
    for name, detection in detectors.items():
        table[name] = np.isin(first, detection.change_points).astype(int)

    figure = Figure(figsize=(SINGLE, 2.3), layout="constrained")
    axes = figure.subplots()
    axes.bar(first, table.breaks_percent, 0.75, color=SKY, label="Token-curve breaks")
    if "shuffled_layers_percent" in table:
        axes.plot(first, table.shuffled_layers_percent, color=BLACK, marker=".", label="Layers shuffled")
        axes.plot(
            first,
            table.threshold_percent,
            color=BLACK,
            linewidth=0.8,
            linestyle=":",
            label=f"Shuffled, {evidence.get('level', 0.95):.0%} limit",
        )
    top = 1.18 * max(axes.get_ylim()[1] / 1.05, 1)
    axes.set_ylim(0, top)
    for layer in first[table.straight_ramp_percent > 0]:
        axes.axvline(layer, color="#BBBBBB", linewidth=4, zorder=0, label="Straight ramp")
    found = detectors["attention_shift"].change_points if "attention_shift" in detectors else []
    for layer in found:
        axes.plot(
            [layer, layer],
            [0, top],
            color=VERMILLION,
            marker="v",
            markevery=[1],
            markersize=5,
            linestyle=(0, (3, 1.5)),
            clip_on=False,
            label="Attention shift",
        )
    own = table[table.token_curve == 1]
    axes.plot(
        own.first_layer_of_new_regime,
        own.breaks_percent + 0.04 * top,
        "*",
        color=BLACK,
        markersize=6,
        markeredgewidth=0,
        label="Token-curve change points",
    )
    axes.set_ylabel("Tokens' curves (%)")
    layer_axis(axes, int(max(layers)) + 1, "First decoder layer of the new regime")
    legend_above(figure, axes.get_legend_handles_labels()[0], columns=2)
    return figure, table
