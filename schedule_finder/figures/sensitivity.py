"""The sensitivity table: answer change of single stages, and the loss of each layer."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from schedule_finder.figures.methods import LABELS
from schedule_finder.figures.style import (
    BLACK,
    KL_FLOOR,
    SINGLE,
    SKY,
    Drawing,
    kl_axis,
    layer_axis,
    legend_above,
    mark_layers,
    words,
)
from schedule_finder.intervals import band, bootstrap_weights
from schedule_finder.measuring.answer_change import answer_change

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from schedule_finder.figures.run_data import RunData
    from schedule_finder.measuring.sensitivity_table import SensitivityTable

LOSS_RATIO = 0.1
"""Keep ratio at which the losses of layers are shown."""
_RESAMPLES = 200
_MARKERS = "osD^vPX"


def sensitivity(data: RunData) -> Drawing | None:
    """Answer change after one stage alone; below it, the loss of each layer at a small keep ratio."""
    measured, num_layers = data.sensitivity, data.num_layers
    if measured is None or num_layers is None:
        return None
    table, losses = changes(measured), layer_losses(measured, num_layers)
    figure = Figure(figsize=(SINGLE, 3.9), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(1.5, 1))
    _draw_change(above, measured, table, num_layers)
    _draw_losses(below, losses)
    layer_axis(below, num_layers)
    figure.align_ylabels([above, below])
    title = textwrap.fill(f"{_policy(measured)}; {len(measured.sample_ids)} samples", 48)
    title += "\nBands and black lines: 95% bootstrap intervals"
    if min(measured.layers) < 0:
        _label_before(above)
    handles = [*above.get_lines()[: len(measured.ratios)], *mark_layers([above, below], data)]
    legend_above(figure, handles, columns=3, title=title)
    return figure, table.merge(losses.assign(loss_ratio=LOSS_RATIO), on="layer", how="outer")


def _policy(measured: SensitivityTable) -> str:
    """Scorers and dropped tokens in words."""
    policy = measured.policy
    rules = LABELS.get(policy.scorer) or words(policy.scorer).capitalize()
    if policy.pre_decoder is not None and policy.pre_decoder != policy.scorer:
        first = LABELS.get(policy.pre_decoder) or words(policy.pre_decoder).capitalize()
        rules = f"{first} before the decoder, then {rules}"
    return f"{rules}; dropped tokens {'merged' if policy.dropped_tokens == 'merge' else 'discarded'}"


def changes(measured: SensitivityTable) -> pd.DataFrame:
    """One row per layer and keep ratio: answer change with its 95 % bootstrap interval over samples, and answer KL.

    Columns: ``layer, keep_ratio, change_mean, change_low, change_high, kl_mean, samples``. Changes are shares of
    answers in [0, 1], the KL is in nats. Layer -1 is a stage before the decoder.
    """
    samples = len(measured.sample_ids)
    found = band(answer_change(measured.kl).reshape(-1, samples).T, resamples=_RESAMPLES)
    return pd.DataFrame(
        {
            "layer": np.repeat(measured.layers, len(measured.ratios)),
            "keep_ratio": np.tile(measured.ratios, len(measured.layers)),
            "change_mean": found.mean,
            "change_low": found.low,
            "change_high": found.high,
            "kl_mean": measured.kl.mean(axis=2).ravel(),
            "samples": samples,
        }
    )


def layer_losses(measured: SensitivityTable, num_layers: int) -> pd.DataFrame:
    """``layer, loss, loss_low, loss_high``: answer change that each layer adds at `LOSS_RATIO`, with 95 % intervals.

    Layers before the earliest stage are not in the table.
    """
    ratio, layers = np.array([LOSS_RATIO]), np.arange(measured.earliest + 1, num_layers)
    weights = bootstrap_weights(len(measured.sample_ids), _RESAMPLES, seed=0)
    resampled = [measured.layer_loss(num_layers, ratio, drawn)[layers, 0] for drawn in weights]
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    loss = measured.layer_loss(num_layers, ratio)[layers, 0]
    return pd.DataFrame({"layer": layers, "loss": loss, "loss_low": low, "loss_high": high})


def _draw_change(axes: Axes, measured: SensitivityTable, table: pd.DataFrame, num_layers: int) -> None:
    """A line with its interval for each keep ratio."""
    shades = matplotlib.colormaps["viridis"](np.linspace(0.9, 0.0, len(measured.ratios)))
    x = np.array(measured.layers) + 0.5
    for index, kept in enumerate(measured.ratios):
        rows = table.iloc[index :: len(measured.ratios)]
        low, mean, high = (rows[f"change_{part}"].clip(lower=KL_FLOOR) for part in ("low", "mean", "high"))
        axes.fill_between(x, low, high, color=shades[index], alpha=0.18, linewidth=0)
        axes.plot(
            x,
            mean,
            color=shades[index],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=3.0 if num_layers <= 16 else 2.0,
            linewidth=1.0,
            clip_on=False,
            label=f"{100 * kept:g}% kept",
        )
    axes.set_ylabel("Answers changed (share)")
    kl_axis(axes, table.change_high.to_numpy())


def _label_before(axes: Axes) -> None:
    """Name the stage at the left edge."""
    axes.axvline(-0.5, color="#BBBBBB", linewidth=0.6, zorder=0)
    axes.annotate(
        "\u2193 before the decoder",
        (-0.5, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-3, 2),
        textcoords="offset points",
        fontsize=6.5,
        color="#555555",
    )


def _draw_losses(axes: Axes, losses: pd.DataFrame) -> None:
    loss = losses.loss
    axes.bar(losses.layer, loss, 0.75, color=SKY)
    lengths = [loss - np.minimum(losses.loss_low, loss), np.maximum(losses.loss_high, loss) - loss]
    axes.errorbar(losses.layer, loss, lengths, fmt="none", ecolor=BLACK, elinewidth=0.7)
    axes.set_ylabel(f"Loss, {LOSS_RATIO:.0%} kept (share)")
    axes.set_ylim(bottom=0)
