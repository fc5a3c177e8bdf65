"""How attention on vision tokens changes from layer to layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from schedule_finder.figures.style import (
    BLUE,
    GREEN,
    PURPLE,
    SINGLE,
    Drawing,
    draw_curve,
    layer_axis,
    legend_above,
    legend_over,
    mark_layers,
)
from schedule_finder.intervals import band
from schedule_finder.signals import layer_shift, spread

if TYPE_CHECKING:
    from schedule_finder.figures.run_data import RunData


def shift(data: RunData) -> Drawing | None:
    """Divergence of the vision distributions of neighbouring layers; below it, vision mass and entropy."""
    profile = data.profile
    if profile is None:
        return None
    layers = np.array(profile.meta["layers"])
    divergence = band(layer_shift(spread(profile.maps)))
    largest = np.log2(np.maximum(profile.counts["num_vision"], 2))[:, None]
    mass = band(profile.curves["vision_mass"])
    entropy = band(profile.curves["vision_entropy"] / largest)

    figure = Figure(figsize=(SINGLE, 3.3), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(1.25, 1))
    # The divergence of two layers is drawn between them.
    between, label = (layers[1:] + layers[:-1]) / 2, f"Neighbouring layers, {divergence.level:.0%} band"
    draw_curve(above, between, divergence, BLUE, "o", "-", label)
    above.set_ylabel("JS divergence (bits)")
    above.set_ylim(bottom=0)
    draw_curve(below, layers, mass, GREEN, "s", "-", "Vision attention")
    draw_curve(below, layers, entropy, PURPLE, "^", (0, (3, 1)), "Entropy / maximum")
    below.set_ylabel("Share")
    below.set_ylim(0, 1.02)
    layer_axis(below, profile.num_layers)
    legend_over(above, above.get_lines(), columns=1)
    legend_over(below, below.get_lines(), columns=2)
    legend_above(figure, mark_layers([above, below], data), columns=3)
    figure.align_ylabels([above, below])

    table = pd.DataFrame({"layer": layers})
    nothing = np.full(1, np.nan)  # the first layer has none before it
    for name, curve, before in (
        ("js_bits_from_layer_before", divergence, nothing),
        ("vision_mass", mass, ()),
        ("vision_entropy_share", entropy, ()),
    ):
        for part in ("mean", "low", "high"):
            table[f"{name}_{part}"] = np.concatenate([before, getattr(curve, part)])
    table["vision_entropy_bits_mean"] = profile.curves["vision_entropy"].mean(axis=0)
    return figure, table
