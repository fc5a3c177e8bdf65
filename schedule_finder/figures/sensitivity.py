"""What the solver measured on the model: what one stage alone does to the answer, at every layer."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from schedule_finder.figures.run_data import RunData
from schedule_finder.figures.style import (
    BLACK,
    KL_FLOOR,
    SINGLE,
    SKY,
    Drawing,
    kl_axis,
    layer_axis,
    mark_layers,
    words,
)
from schedule_finder.intervals import bootstrap_weights

LOSS_RATIO = 0.1
"""At which share of the tokens the layers' losses are shown."""
_RESAMPLES = 200
_MARKERS = "osD^vPX"


def sensitivity(data: RunData) -> Drawing | None:
    """KL of the answer token after one stage alone; below it what each layer loses at few tokens."""
    measured, num_layers = data.sensitivity, data.num_layers
    if measured is None or num_layers is None:
        return None
    mean = measured.kl.mean(axis=2)
    table = pd.DataFrame(
        {
            "layer": np.repeat(measured.layers, len(measured.ratios)),
            "keep_ratio": np.tile(measured.ratios, len(measured.layers)),
            "kl_mean": mean.ravel(),
            "samples": len(measured.sample_ids),
        }
    )
    ratio = np.array([LOSS_RATIO])
    # Where nothing can be dropped before the first layer, its loss is unknown.
    layers = np.arange(measured.earliest + 1, num_layers)
    loss = measured.layer_loss(num_layers, ratio)[layers, 0]
    resampled = [
        measured.layer_loss(num_layers, ratio, weights)[layers, 0]
        for weights in bootstrap_weights(len(measured.sample_ids), _RESAMPLES, seed=0)
    ]
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    losses = pd.DataFrame({"layer": layers, "loss": loss, "loss_low": low, "loss_high": high})
    table = table.merge(losses.assign(loss_ratio=LOSS_RATIO), on="layer", how="outer")

    figure = Figure(figsize=(SINGLE, 3.7), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(1.5, 1))
    shades = matplotlib.colormaps["viridis"](np.linspace(0.9, 0.0, len(measured.ratios)))
    for place, kept in enumerate(measured.ratios):
        above.plot(
            np.array(measured.layers) + 0.5,
            np.maximum(mean[:, place], KL_FLOOR),
            color=shades[place],
            marker=_MARKERS[place % len(_MARKERS)],
            markersize=3.0 if num_layers <= 16 else 2.0,
            linewidth=1.0,
            clip_on=False,
            label=f"{100 * kept:g}% kept",
        )
    above.set_ylabel("KL, one stage (nats)")
    kl_axis(above, mean)
    below.bar(layers, loss, 0.75, color=SKY)
    below.errorbar(
        layers, loss, [loss - np.minimum(low, loss), np.maximum(high, loss) - loss],
        fmt="none", ecolor=BLACK, elinewidth=0.7,
    )  # fmt: skip
    below.set_ylabel(f"Loss at {LOSS_RATIO:.0%} (nats)")
    below.set_ylim(bottom=0)
    layer_axis(below, num_layers)
    figure.align_ylabels([above, below])
    title = (
        f"{words(str(measured.policy)).capitalize()}; 95% intervals over {len(measured.sample_ids)} samples"
    )
    mark_layers(
        figure, [above, below], data, above.get_lines()[: len(measured.ratios)], columns=3, title=title
    )
    return figure, table
