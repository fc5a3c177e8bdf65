"""Parts of the report's charts: axes, tooltips, and the specification of a chart that fills its container."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np
import pandas as pd

from schedule_finder.figures.style import VERMILLION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from schedule_finder.figures.run_data import RunData

Spec = dict[str, Any]
"""A Vega-Lite specification."""

GREY = "#888888"
"""Visible on light and on dark."""

HEIGHT = 260
"""Height of a chart in pixels, without its axes."""


def layer_rows(layers: Sequence[int] | range | np.ndarray) -> pd.DataFrame:
    """One row per layer with the edges of its unit of the axis."""
    numbers = np.asarray(list(layers))
    return pd.DataFrame({"layer": numbers, "start": numbers - 0.5, "end": numbers + 0.5})


def layer_axis(num_layers: int) -> alt.X:
    """The axis of layers for bars from ``start`` to ``end``; see `layer_rows`."""
    scale = alt.Scale(domain=[-0.5, num_layers - 0.5], nice=False)
    return alt.X("start:Q", title="Decoder layer", scale=scale, axis=alt.Axis(tickMinStep=1, format="d"))


def point_axis(num_layers: int) -> alt.X:
    """The axis of layers for points at ``layer``."""
    scale = alt.Scale(domain=[-0.5, num_layers - 0.5], nice=False)
    return alt.X("layer:Q", title="Decoder layer", scale=scale, axis=alt.Axis(tickMinStep=1, format="d"))


def change_point_rules(data: RunData) -> list[Any]:
    """Vertical lines at the change points; an empty list where there are none."""
    if not data.change_points:
        return []
    table = pd.DataFrame({"at": [layer - 0.5 for layer in data.change_points], "layer": data.change_points})
    rule = alt.Chart(table).mark_rule(color=VERMILLION, strokeDash=[5, 3], size=1.5)
    return [rule.encode(x="at:Q", tooltip=[tip("layer", "Change point", "d")])]


def tip(field: str, title: str, form: str = ".1f") -> alt.Tooltip:
    """A number of a tooltip in the format ``form``."""
    return alt.Tooltip(f"{field}:Q", title=title, format=form)


def spec(chart: Any, description: str, height: int = HEIGHT) -> Spec:
    """The specification of a chart that fills its container and announces ``description`` to a screen reader."""
    whole = chart.properties(width="container", height=height, description=description)
    spec: Spec = whole.to_dict()
    spec.pop("config", None)
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return spec
