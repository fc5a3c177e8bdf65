"""Charts of what step 4 measured: the sensitivity table and the front over budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt
import pandas as pd

from schedule_finder.figures.sensitivity import LOSS_RATIO, changes, layer_losses
from schedule_finder.figures.style import KL_FLOOR, SKY
from schedule_finder.report.vega import GREY, Spec, point_axis, spec, tip

if TYPE_CHECKING:
    from schedule_finder.figures.run_data import RunData


def sensitivity(data: RunData) -> Spec | None:
    """Answer change of single stages with intervals, by layer and keep ratio."""
    measured = data.sensitivity
    if measured is None:
        return None
    found = changes(measured)
    table = pd.DataFrame(
        {
            "layer": found.layer,
            "kept": [f"{100 * ratio:g} %" for ratio in found.keep_ratio],
            "change": found.change_mean,
            "shown": found.change_mean.clip(lower=KL_FLOOR),
            "interval": [
                f"{_share(low)} to {_share(high)}"
                for low, high in zip(found.change_low, found.change_high, strict=True)
            ],
        }
    )
    legend = alt.Legend(
        title="Answers changed (share, log scale)", orient="bottom", gradientLength=240, titleLimit=320
    )
    largest = float(found.change_mean.max())
    scale = alt.Scale(type="log", scheme="viridis", domain=[KL_FLOOR, max(largest, 10 * KL_FLOOR)])
    axis = alt.Axis(labelExpr="datum.value == -1 ? 'before' : datum.label", labelAngle=0, labelOverlap=True)
    tips = [
        tip("layer", "After layer", "d"), alt.Tooltip("kept:N", title="Kept"),
        tip("change", "Answers changed", ".2%"), alt.Tooltip("interval:N", title="95 % interval"),
    ]  # fmt: skip
    chart = alt.Chart(table).mark_rect().encode(
        x=alt.X("layer:O", title="Stage after decoder layer", axis=axis),
        y=alt.Y("kept:N", title="Vision tokens kept", sort=None),
        color=alt.Color("shown:Q", scale=scale, legend=legend),
        tooltip=tips,
    )  # fmt: skip
    return spec(chart, "Answer change of single stages", 200)


def loss(data: RunData) -> Spec | None:
    """Answer change that each layer adds at a small keep ratio, with intervals."""
    measured, num_layers = data.sensitivity, data.num_layers
    if measured is None or num_layers is None:
        return None
    table = layer_losses(measured, num_layers)
    # The interval is of resampled tables; it holds the value itself.
    table["low"], table["high"] = (
        table[["loss_low", "loss"]].min(axis=1),
        table[["loss_high", "loss"]].max(axis=1),
    )
    base = alt.Chart(table).encode(x=point_axis(num_layers))
    tips = [
        tip("layer", "Layer", "d"), tip("loss", "Loss", ".2%"), tip("low", "Lower", ".2%"),
        tip("high", "Upper", ".2%"),
    ]  # fmt: skip
    title = f"Loss, {LOSS_RATIO:.0%} kept (share)"
    y = alt.Y("loss:Q", title=title)
    chart = alt.layer(
        base.mark_bar(color=SKY, size=12).encode(y=y, tooltip=tips),
        base.mark_rule(size=1.5, color=GREY).encode(y=alt.Y("low:Q", title=title), y2="high:Q", tooltip=tips),
    )
    return spec(chart, "Loss of each layer", 200)


def _share(value: float) -> str:
    return f"{100 * value:.2g} %" if value >= KL_FLOOR else f"< {100 * KL_FLOOR:g} %"


def front(data: RunData) -> Spec | None:
    """Answer change of the best schedule of each budget."""
    if data.pareto is None:
        return None
    table = data.pareto.sort_values("processed").melt(
        ["budget", "processed", "num_stages"], ["predicted_change", "measured_change"], "which", "change"
    )
    table = table.dropna(subset=["change"]).assign(processed=100 * table.processed)
    table["change"] = table.change.clip(lower=KL_FLOOR)
    table["which"] = table.which.map({"predicted_change": "Predicted", "measured_change": "Measured"})
    tips = [
        alt.Tooltip("which:N"),
        tip("processed", "Processed (%)"),
        tip("change", "Answers changed", ".2%"),
    ]
    chart = alt.Chart(table).mark_line(point=True).encode(
        x=alt.X("processed:Q", title="Vision tokens processed (%)", scale=alt.Scale(zero=False)),
        y=alt.Y("change:Q", title="Answers changed (share, log scale)", scale=alt.Scale(type="log")),
        color=alt.Color("which:N", title=None, legend=alt.Legend(orient="bottom")),
        strokeDash=alt.StrokeDash("which:N", title=None), tooltip=tips,
    )  # fmt: skip
    return spec(chart, "Answer change by budget", 240)
