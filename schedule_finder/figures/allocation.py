"""Which part of the attention goes to text, vision tokens and the answer, by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from schedule_finder.evaluation.allocation_table import KEYS, QUERIES
from schedule_finder.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SINGLE,
    Drawing,
    layer_axis,
    legend_above,
)
from schedule_finder.intervals import band

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from schedule_finder.figures.run_data import RunData

LOOKS = {
    "system": ("Text before the image", GREY, "////"),
    "vision": ("Vision tokens", BLUE, ""),
    "question": ("Question", ORANGE, "\\\\\\\\"),
    "answer": ("Answer so far", GREEN, "...."),
}
"""Label, colour and hatch of each part."""
TITLES = {"question": "Attention of the question", "answer": "Attention while the answer is generated"}


def attention_allocation(data: RunData) -> Drawing | None:
    """Stacked shares of attention by layer, of the question's tokens and of the positions that generate the answer."""
    found = data.allocation
    if found is None:
        return None
    num_layers = data.num_layers or int(found.layer.max()) + 1
    table = allocation_means(found)
    figure = Figure(figsize=(SINGLE, 3.5), layout="constrained")
    panels = figure.subplots(len(QUERIES), sharex=True)
    for axes, queries in zip(panels, QUERIES, strict=True):
        _stack(axes, table[table.queries == queries])
        axes.set_title(TITLES[queries], fontsize=7.5, loc="left", pad=2)
    layer_axis(panels[-1], num_layers)
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label)
        for label, colour, hatch in LOOKS.values()
    ]
    legend_above(figure, handles, columns=2, title=_title(found))
    return figure, table


def allocation_means(found: pd.DataFrame) -> pd.DataFrame:
    """``queries, layer, keys, share, low, high``: means over samples with 95 % bootstrap intervals."""
    parts = []
    for queries in QUERIES:
        some = found[found.queries == queries]
        for keys in KEYS:
            wide = some.pivot(index="id", columns="layer", values=keys)
            one = band(wide.to_numpy())
            parts.append(
                pd.DataFrame(
                    {
                        "queries": queries,
                        "layer": wide.columns.to_numpy(),
                        "keys": keys,
                        "share": one.mean,
                        "low": one.low,
                        "high": one.high,
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def _stack(axes: Axes, table: pd.DataFrame) -> None:
    """One bar per layer; the height of each part is its share."""
    layers = np.sort(table.layer.unique())
    below = np.zeros(len(layers))
    for keys, (_, colour, hatch) in LOOKS.items():
        share = 100 * table[table["keys"] == keys].sort_values("layer").share.to_numpy()
        axes.bar(layers, share, 0.9, below, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        below += share
    axes.set_ylim(0, 100)
    axes.set_ylabel("Attention (%)")


def _title(found: pd.DataFrame) -> str:
    """Number of samples, and the share of vision tokens in their prompts."""
    once = found.drop_duplicates("id")
    prompt = once[["num_system", "num_vision", "num_question"]].sum(axis=1)
    share = float((once.num_vision / prompt).mean())
    return f"Full model, mean of {len(once)} samples;\nvision tokens are {share:.0%} of a prompt"
