"""What the profile shows: attention on vision tokens, how it moves, and where it changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from schedule_finder.errors import InputError
from schedule_finder.figures.run_data import RunData, need
from schedule_finder.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    PURPLE,
    SINGLE,
    SKY,
    VERMILLION,
    Drawing,
    draw_curve,
    layer_axis,
    legend_above,
    mark_layers,
)
from schedule_finder.signals import band, layer_shift, vision_distribution

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAP_ROWS = 64


def attention_map(data: RunData) -> Drawing | None:
    """Layer x token, tokens ranked within each sample by total attention, mean over samples.

    Each layer is divided by its mean over tokens, so that 1 is what every token would get if attention
    were even, in layers that look at the image much or little.
    """
    profile = data.profile
    if profile is None:
        return None
    layers, edges = profile.meta["layers"], _rank_edges(round(profile.mean_vision))
    values = ranked_attention(profile.maps, edges)
    table = pd.DataFrame(
        {
            "layer": np.repeat(layers, len(edges) - 1),
            "first_rank": np.tile(edges[:-1] + 1, len(layers)),
            "last_rank": np.tile(edges[1:], len(layers)),
            "attention_over_even": values.ravel(),
        }
    )
    # Layers without attention (hybrid backbones) stay empty columns.
    columns = np.full((profile.num_layers, values.shape[1]), np.nan)
    columns[layers] = values

    figure = Figure(figsize=(SINGLE, 2.3), layout="constrained")
    axes = figure.subplots()
    low, high = np.nanquantile(values, [0.02, 0.998])
    low = max(low, high / 1e3)
    mesh = axes.pcolormesh(
        np.arange(profile.num_layers + 1) - 0.5,
        edges + 0.5,
        np.ma.masked_invalid(columns.T),
        norm=LogNorm(low, high, clip=True),
        cmap="Blues",
        rasterized=True,
    )
    axes.set_yscale("log")
    axes.invert_yaxis()
    decades = [10**n for n in range(6) if 10**n <= edges[-1] / 2]
    axes.set_yticks([*decades, edges[-1]], [str(rank) for rank in (*decades, edges[-1])])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("Vision token, by attention rank")
    bar = figure.colorbar(mesh, ax=axes, aspect=25, pad=0.02)
    bar.set_label("Attention / even share")
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0)))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.outline.set_linewidth(0.6)
    layer_axis(axes, profile.num_layers)
    mark_layers(figure, [axes], data)
    return figure, table


def _rank_edges(num_vision: int) -> np.ndarray:
    """Edges of at most `_MAP_ROWS` bins of ranks, single ranks first, then ever wider ones."""
    edges = np.unique(np.geomspace(1, num_vision, _MAP_ROWS).round().astype(int))
    return np.concatenate([[0], edges])


def ranked_attention(maps: Sequence[np.ndarray], edges: np.ndarray) -> np.ndarray:
    """Mean over samples of each layer's attention per bin of ranks, over an even share.

    Returns ``[layers, bins]``. Samples of other lengths are stretched to the edges' number of tokens.
    """
    total, known = 0.0, 0.0
    for sample in maps:
        ranked = sample[:, np.argsort(-sample.sum(axis=0), kind="stable")].astype(np.float64)
        mass = np.pad(np.cumsum(vision_distribution(ranked), axis=1), ((0, 0), (1, 0)))
        places = edges / edges[-1] * ranked.shape[1]
        below = np.stack([np.interp(places, np.arange(mass.shape[1]), row) for row in mass])
        share = np.diff(below, axis=1) / (np.diff(edges) / edges[-1])
        total, known = total + np.nan_to_num(share), known + ~np.isnan(share)
    with np.errstate(invalid="ignore"):  # a layer that no sample knows is NaN
        return np.asarray(total / known)


def shift(data: RunData) -> Drawing | None:
    """Change of the vision distribution from layer to layer; below it vision mass and entropy."""
    profile = data.profile
    if profile is None:
        return None
    layers = np.array(profile.meta["layers"])
    shift = band(layer_shift(profile.maps))
    largest = np.log2(np.maximum(profile.counts["num_vision"], 2))[:, None]
    mass = band(profile.curves["vision_mass"])
    entropy = band(profile.curves["vision_entropy"] / largest)

    figure = Figure(figsize=(SINGLE, 2.9), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(1.25, 1))
    # A gap stands between its two layers.
    draw_curve(above, (layers[1:] + layers[:-1]) / 2, shift, BLUE, "o", "-")
    above.set_ylabel("JS divergence (bits)")
    above.set_ylim(bottom=0)
    draw_curve(below, layers, mass, GREEN, "s", "-", "Vision mass")
    draw_curve(below, layers, entropy, PURPLE, "^", (0, (3, 1)), "Vision entropy / largest")
    below.set_ylabel("Share")
    below.set_ylim(0, 1.02)
    layer_axis(below, profile.num_layers)
    mark_layers(figure, [above, below], data, [*below.get_lines()[:2]])

    table = pd.DataFrame({"layer": layers})
    nothing = np.full(1, np.nan)  # the first layer has none before it
    for name, curve, before in (
        ("js_bits_from_layer_before", shift, nothing),
        ("vision_mass", mass, ()),
        ("vision_entropy_share", entropy, ()),
    ):
        for part in ("mean", "low", "high"):
            table[f"{name}_{part}"] = np.concatenate([before, getattr(curve, part)])
    table["vision_entropy_bits_mean"] = profile.curves["vision_entropy"].mean(axis=0)
    return figure, table


def change_points(data: RunData) -> Drawing | None:
    """Where the tokens' cumulative curves break, beside what no shift at all would give."""
    if data.detections is None:
        return None
    path, detectors = data.run.change_points, data.detections["detectors"]
    evidence = detectors.get("token_curve", {}).get("evidence", {})
    if not evidence or "reason" in evidence:  # not run, or too few layers for it
        return None
    need(evidence, ("histogram", "straight_ramp", "num_curves"), path, "detect again")
    layers = data.detections.get("layers") or list(range(len(evidence["histogram"])))
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
        table[name] = np.isin(first, detection["change_points"]).astype(int)

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
    found = detectors.get("attention_shift", {}).get("change_points", [])
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
            label="Distribution shift",
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
    legend_above(figure, axes.get_legend_handles_labels(), columns=2)
    return figure, table
