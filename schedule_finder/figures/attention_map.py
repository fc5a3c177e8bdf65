"""Which share of the attention the vision tokens get, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from schedule_finder.figures.style import SINGLE, Drawing, layer_axis, legend_above, mark_layers
from schedule_finder.signals import in_any_order, spread, vision_distribution

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes

    from schedule_finder.figures.run_data import RunData

_MAP_ROWS = 64


def attention_map(data: RunData) -> Drawing | None:
    """Layer x token, tokens ranked within each sample by total attention, mean over samples.

    Each layer is divided by its mean over tokens: 1 is the attention of a token if the layer's attention to vision
    tokens were uniform, whether that is much or little.
    """
    profile = data.profile
    if profile is None:
        return None
    layers, edges = profile.meta["layers"], rank_edges(round(profile.mean_vision))
    values = ranked_attention(spread(profile.maps), edges)
    table = pd.DataFrame(
        {
            "layer": np.repeat(layers, len(edges) - 1),
            "first_rank": np.tile(edges[:-1] + 1, len(layers)),
            "last_rank": np.tile(edges[1:], len(layers)),
            "attention_over_even": values.ravel(),
        }
    )
    columns = np.full((profile.num_layers, values.shape[1]), np.nan)
    columns[layers] = values
    figure = Figure(figsize=(SINGLE, 2.3), layout="constrained")
    axes = figure.subplots()
    _draw_map(figure, axes, columns.T, edges)
    layer_axis(axes, profile.num_layers)
    legend_above(figure, mark_layers([axes], data), columns=2)
    return figure, table


def _draw_map(figure: Figure, axes: Axes, values: np.ndarray, edges: np.ndarray) -> None:
    """Draw ``[bins, layers]``; NaN stays empty."""
    low, high = np.nanquantile(values, [0.02, 0.998])
    low = max(low, high / 1e3)
    # The bin of ranks a to b reaches from a to b + 1, so that the first one has the width of the others.
    mesh = axes.pcolormesh(
        np.arange(values.shape[1] + 1) - 0.5,
        edges + 1,
        np.ma.masked_invalid(values),
        norm=LogNorm(low, high, clip=True),
        cmap="Blues",
        rasterized=True,
    )
    axes.set_yscale("log")
    axes.invert_yaxis()
    decades = [10**n for n in range(6) if 10**n <= edges[-1] / 2]
    axes.set_yticks([*decades, edges[-1]], [str(rank) for rank in (*decades, edges[-1])])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("Vision token rank (log scale)")
    bar = figure.colorbar(mesh, ax=axes, aspect=25, pad=0.02)
    bar.set_label("Attention / uniform attention\n(log scale, mean over samples)")
    span = high / low
    steps: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0) if span > 12 else (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    if span < 5:
        steps = (1.0, 1.2, 1.5, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 9.0)
    ticks = [step * 10.0**power for power in range(-4, 5) for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    bar.ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.outline.set_linewidth(0.6)


def rank_edges(num_vision: int) -> np.ndarray:
    """Edges of at most `_MAP_ROWS` bins of ranks, single ranks first, then ever wider ones."""
    edges = np.unique(np.geomspace(1, num_vision, _MAP_ROWS).round().astype(int))
    return np.concatenate([[0], edges])


def ranked_attention(maps: Iterable[np.ndarray], edges: np.ndarray) -> np.ndarray:
    """Mean over samples of each layer's attention per bin of ranks, over an even share.

    Returns ``[layers, bins]``. Samples of other lengths are stretched to the edges' number of tokens.
    """
    total, known = 0.0, 0.0
    for _, sample in in_any_order(maps):
        ranked = sample[:, np.argsort(-sample.sum(axis=0), kind="stable")].astype(np.float64)
        mass = np.pad(np.cumsum(vision_distribution(ranked), axis=1), ((0, 0), (1, 0)))
        at = edges / edges[-1] * ranked.shape[1]
        below = np.stack([np.interp(at, np.arange(mass.shape[1]), row) for row in mass])
        share = np.diff(below, axis=1) / (np.diff(edges) / edges[-1])
        total, known = total + np.nan_to_num(share), known + ~np.isnan(share)
    with np.errstate(invalid="ignore"):  # a layer that no sample knows is NaN
        return np.asarray(total / known)
