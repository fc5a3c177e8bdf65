"""The charts of the report as Vega-Lite specifications, made with Altair.

Colours of axes and text come from the page's theme. Every chart fills the width of its container.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np
import pandas as pd

from pruning_runtime.costs import processed_ratios, published_ratios
from schedule_finder.figures.attention_map import rank_edges, ranked_attention
from schedule_finder.figures.held_out import held_out_results
from schedule_finder.figures.style import (
    BLUE,
    GREEN,
    KL_FLOOR,
    LABELS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    words,
)
from schedule_finder.intervals import band
from schedule_finder.measuring.answer_change import answer_change
from schedule_finder.signals import layer_shift

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from schedule_finder.figures.run_data import RunData

Spec = dict[str, Any]
"""A Vega-Lite specification."""

HEIGHT = 260


def staircase(data: RunData) -> Spec | None:
    """Vision tokens that each layer computes, with the range over resampled measurements."""
    schedule = data.schedule
    if schedule is None:
        return None
    num_layers, whole = schedule.backbone.num_layers, data.mean_vision or 100.0
    unit = "Vision tokens" if data.mean_vision else "Vision tokens (%)"
    table = _layers(range(num_layers)).assign(
        processed=whole * np.array(processed_ratios(schedule.stages, num_layers)),
        published=whole * np.array(published_ratios(schedule.stages, num_layers)),
    )
    base = alt.Chart(table).encode(x=_layer_axis(num_layers), x2="end")
    y = alt.Y("processed:Q", title=unit, scale=alt.Scale(domain=[0, 1.05 * whole]))
    tooltip = [
        _tip("layer", "Layer", "d"),
        _tip("processed", "Computed"),
        _tip("published", "Published count"),
    ]
    layers = [
        base.mark_rect(color=BLUE, opacity=0.8).encode(y=y, y2=alt.datum(0), tooltip=tooltip),
        base.mark_rule(strokeDash=[3, 2], size=1.5, color=ORANGE).encode(y="published:Q"),
    ]
    solver = data.evidence.solver
    if (
        solver is not None
        and solver.confidence is not None
        and len(solver.confidence.ratio_low) == num_layers
    ):
        bands = table.assign(
            low=whole * np.array(solver.confidence.ratio_low),
            high=whole * np.array(solver.confidence.ratio_high),
        )
        tips = [_tip("low", "Lower edge"), _tip("high", "Upper edge")]
        outline = alt.Chart(bands).mark_rect(color=SKY, opacity=0.45, stroke=SKY, strokeWidth=1)
        layers.append(
            outline.encode(x=_layer_axis(num_layers), x2="end", y="low:Q", y2="high:Q", tooltip=tips)
        )
    return _spec(alt.layer(*layers, *_change_points(data)), "Vision tokens by decoder layer")


def accuracy(data: RunData) -> Spec | None:
    """Score against the vision tokens that are processed, by method, with intervals."""
    results = held_out_results(data)
    if results is None:
        return None
    table = results.table.assign(
        label=[method_label(name, data) for name in results.table.method],
        **{name: 100 * results.table[name] for name in ("processed", "value", "ci_low", "ci_high")},
    )
    return accuracy_of(table, results.label)


def accuracy_of(table: pd.DataFrame, label: str) -> Spec:
    """The same from a table ``label, processed, value, ci_low, ci_high`` in percent."""
    pick = alt.selection_point(fields=["label"], bind="legend")
    shown = alt.condition(pick, alt.value(1.0), alt.value(0.15))
    order = list(dict.fromkeys(table.label))
    # The legends of colour and shape are one where their settings are equal.
    legend = alt.Legend(orient="bottom", columns=2, labelLimit=260, symbolOpacity=1)
    colours = alt.Scale(scheme="tableau10" if len(order) <= 10 else "tableau20", domain=order)
    colour = alt.Color("label:N", title=None, legend=legend, scale=colours)
    shape = alt.Shape("label:N", title=None, legend=legend, scale=alt.Scale(domain=order))
    x = alt.X(
        "processed:Q", title="Vision tokens processed (%)", scale=alt.Scale(domain=[0, 103], nice=False)
    )
    lowest = 5 * np.floor(min(table.ci_low.min(), table.value.min()) / 5)
    limits = alt.Scale(domain=[max(0.0, float(lowest)), 101], nice=False)
    y = alt.Y("value:Q", title=label, scale=limits)
    tips = [
        alt.Tooltip("label:N", title="Method"), _tip("value", label), _tip("ci_low", "Lower"),
        _tip("ci_high", "Upper"), _tip("processed", "Processed"),
    ]  # fmt: skip
    base = alt.Chart(table).encode(x=x, color=colour, opacity=shown)
    chart = alt.layer(
        base.mark_line(size=1.5).encode(y=y),
        base.mark_rule(size=1.2).encode(y=alt.Y("ci_low:Q", title=label), y2="ci_high:Q"),
        base.mark_point(filled=True, size=70).encode(y=y, tooltip=tips, shape=shape),
    ).add_params(pick)
    return _spec(chart, f"{label} by vision tokens processed", 320)


def attention_map(data: RunData) -> Spec | None:
    """Attention of each layer to vision tokens by rank, relative to uniform attention."""
    if data.profile is None:
        return None
    layers, edges = data.profile.layers, rank_edges(round(data.profile.mean_vision))
    values = ranked_attention(data.profile.maps, edges)
    bins = len(edges) - 1
    table = _layers(np.repeat(layers, bins)).assign(
        first=np.tile(edges[:-1] + 1, len(layers)),
        last=np.tile(edges[1:] + 1, len(layers)),
        attention=values.ravel().round(4),
    )
    low, high = np.nanquantile(values, [0.02, 0.998])
    scale = alt.Scale(
        type="log", scheme="blues", clamp=True, domain=[max(low, high / 1e3, 1e-6), max(high, 1e-5)]
    )
    tips = [
        _tip("layer", "Layer", "d"), _tip("first", "Rank", "d"), _tip("attention", "Relative to uniform", ".2f")
    ]  # fmt: skip
    rank = alt.Y(
        "first:Q",
        title="Rank of the token (log scale)",
        scale=alt.Scale(type="log", reverse=True, nice=False),
    )
    legend = alt.Legend(
        title="Attention relative to uniform (log scale)", orient="bottom", gradientLength=240, titleLimit=320
    )
    chart = alt.Chart(table).mark_rect().encode(
        x=_layer_axis(data.profile.num_layers), x2="end", y=rank, y2="last",
        color=alt.Color("attention:Q", scale=scale, legend=legend), tooltip=tips,
    )  # fmt: skip
    return _spec(alt.layer(chart, *_change_points(data)), "Attention by layer and token rank", 300)


def shift(data: RunData) -> Spec | None:
    """Divergence of the attention of neighbouring layers, with its band and the change points."""
    if data.profile is None or len(data.profile.layers) < 2:
        return None
    layers = np.array(data.profile.layers)
    found = band(layer_shift(data.profile.maps))
    table = pd.DataFrame(
        {"layer": (layers[1:] + layers[:-1]) / 2, "mean": found.mean, "low": found.low, "high": found.high}
    )
    x = _point_axis(data.profile.num_layers)
    base = alt.Chart(table).encode(x=x)
    tips = [
        _tip("layer", "Between layers", ".1f"),
        *(_tip(name, name, ".4f") for name in ("mean", "low", "high")),
    ]
    chart = alt.layer(
        base.mark_area(color=BLUE, opacity=0.25).encode(
            y=alt.Y("low:Q", title="JS divergence (bits)"), y2="high:Q"
        ),
        base.mark_line(color=BLUE, point=alt.OverlayMarkDef(size=35, color=BLUE)).encode(
            y="mean:Q", tooltip=tips
        ),
        *_change_points(data),
    )
    return _spec(chart, "Attention shift between neighbouring layers", 220)


def vision_mass(data: RunData) -> Spec | None:
    """Share of attention on vision tokens, and entropy within them as a share of the largest possible one."""
    profile = data.profile
    if profile is None:
        return None
    largest = np.log2(np.maximum(profile.counts["num_vision"], 2))[:, None]
    curves = {
        "Attention on vision tokens": band(profile.curves["vision_mass"]),
        "Entropy / largest entropy": band(profile.curves["vision_entropy"] / largest),
    }
    table = pd.concat(
        pd.DataFrame(
            {"layer": profile.layers, "curve": name, "mean": one.mean, "low": one.low, "high": one.high}
        )
        for name, one in curves.items()
    )
    colour = alt.Color(
        "curve:N", title=None, sort=list(curves),
        legend=alt.Legend(orient="bottom", columns=1, labelLimit=300, symbolOpacity=1, symbolType="stroke"),
        scale=alt.Scale(domain=list(curves), range=[GREEN, PURPLE]),
    )  # fmt: skip
    base = alt.Chart(table).encode(x=_point_axis(profile.num_layers), color=colour)
    y = alt.Y("low:Q", title="Share", scale=alt.Scale(domain=[0, 1]))
    tips = [_tip("layer", "Layer", "d"), alt.Tooltip("curve:N"), _tip("mean", "mean", ".3f")]
    chart = alt.layer(
        base.mark_area(opacity=0.25).encode(y=y, y2="high:Q"),
        base.mark_line(point=True).encode(
            y="mean:Q", tooltip=tips, strokeDash=alt.StrokeDash("curve:N", legend=None)
        ),
    )
    return _spec(chart, "Attention on vision tokens by layer", 220)


def sensitivity(data: RunData) -> Spec | None:
    """Answer change of single stages, by layer and keep ratio."""
    measured = data.sensitivity
    if measured is None:
        return None
    mean = answer_change(measured.kl).mean(axis=2)
    table = pd.DataFrame(
        {
            "layer": np.repeat(measured.layers, len(measured.ratios)),
            "kept": np.tile([f"{100 * ratio:g} %" for ratio in measured.ratios], len(measured.layers)),
            "change": mean.ravel(),
            "shown": np.maximum(mean.ravel(), KL_FLOOR),
        }
    )
    legend = alt.Legend(
        title="Answers changed (share, log scale)", orient="bottom", gradientLength=240, titleLimit=320
    )
    scale = alt.Scale(type="log", scheme="viridis", domain=[KL_FLOOR, max(float(mean.max()), 10 * KL_FLOOR)])
    axis = alt.Axis(labelExpr="datum.value == -1 ? 'before' : datum.label", labelAngle=0, labelOverlap=True)
    chart = alt.Chart(table).mark_rect().encode(
        x=alt.X("layer:O", title="Stage after decoder layer", axis=axis),
        y=alt.Y("kept:N", title="Vision tokens kept", sort=None),
        color=alt.Color("shown:Q", scale=scale, legend=legend),
        tooltip=[_tip("layer", "After layer", "d"), alt.Tooltip("kept:N"), _tip("change", "Answers changed", ".2%")],
    )  # fmt: skip
    return _spec(chart, "Answer change of single stages", 200)


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
        _tip("processed", "Processed (%)"),
        _tip("change", "Answers changed", ".2%"),
    ]
    chart = alt.Chart(table).mark_line(point=True).encode(
        x=alt.X("processed:Q", title="Vision tokens processed (%)", scale=alt.Scale(zero=False)),
        y=alt.Y("change:Q", title="Answers changed (share, log scale)", scale=alt.Scale(type="log")),
        color=alt.Color("which:N", title=None, legend=alt.Legend(orient="bottom")),
        strokeDash=alt.StrokeDash("which:N", title=None), tooltip=tips,
    )  # fmt: skip
    return _spec(chart, "Answer change by budget", 240)


CHARTS: dict[str, tuple[str, str, Callable[[RunData], Spec | None]]] = {
    "staircase": (
        "Schedule",
        "Blue: vision tokens that each decoder layer computes, mean over samples. Orange dashes: the count of the "
        "papers. Light blue: range over resampled measurements. Red lines: change points.",
        staircase,
    ),
    "accuracy": (
        "Accuracy and cost",
        "Held-out samples; bars are 95 % intervals. Select a method in the legend to see it alone.",
        accuracy,
    ),
    "front": ("Budgets", "The best schedule of each budget.", front),
    "attention": (
        "Attention map",
        "Tokens are ranked within each sample by total attention; 1 is uniform attention over the vision tokens. "
        "Both the rank axis and the colours are logarithmic.",
        attention_map,
    ),
    "shift": (
        "Attention shift",
        "Jensen-Shannon divergence between the attention of neighbouring layers, with a 95 % band. Red lines: "
        "change points of the detector that schedules follow.",
        shift,
    ),
    "mass": ("Attention on vision tokens", "Mean over samples with 95 % bands.", vision_mass),
    "sensitivity": (
        "Sensitivity",
        "Share of answers that change when one stage alone drops tokens; before: a stage before the decoder. Values below "
        "0.0001 have its colour.",
        sensitivity,
    ),
}
"""Name -> title, caption and function; None where the run lacks the data."""


def method_label(name: str, data: RunData) -> str:
    """The name of a method for a reader."""
    if name == "full":
        return "Full model"
    if name == "schedule":
        return f"Schedule ({words(data.schedule.scorer.name)})" if data.schedule else "Schedule"
    return LABELS.get(name) or words(name).capitalize()


# ---- parts of charts


def _layers(layers: Sequence[int] | range | np.ndarray) -> pd.DataFrame:
    numbers = np.asarray(list(layers))
    return pd.DataFrame({"layer": numbers, "start": numbers - 0.5, "end": numbers + 0.5})


def _layer_axis(num_layers: int) -> alt.X:
    scale = alt.Scale(domain=[-0.5, num_layers - 0.5], nice=False)
    return alt.X("start:Q", title="Decoder layer", scale=scale, axis=alt.Axis(tickMinStep=1, format="d"))


def _point_axis(num_layers: int) -> alt.X:
    scale = alt.Scale(domain=[-0.5, num_layers - 0.5], nice=False)
    return alt.X("layer:Q", title="Decoder layer", scale=scale, axis=alt.Axis(tickMinStep=1, format="d"))


def _change_points(data: RunData) -> list[Any]:
    if not data.change_points:
        return []
    table = pd.DataFrame({"at": [layer - 0.5 for layer in data.change_points], "layer": data.change_points})
    rule = alt.Chart(table).mark_rule(color=VERMILLION, strokeDash=[5, 3], size=1.5)
    return [rule.encode(x="at:Q", tooltip=[_tip("layer", "Change point", "d")])]


def _tip(field: str, title: str, form: str = ".1f") -> alt.Tooltip:
    return alt.Tooltip(f"{field}:Q", title=title, format=form)


def _spec(chart: Any, description: str, height: int = HEIGHT) -> Spec:
    """The specification of a chart that fills its container and announces ``description`` to a screen reader."""
    whole = chart.properties(width="container", height=height, description=description)
    spec: Spec = whole.to_dict()
    spec.pop("config", None)
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return spec
