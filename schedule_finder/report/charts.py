"""The charts of the report as Vega-Lite specifications, made with Altair.

Colours of axes and text come from the page's theme. Every chart fills the width of its container.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt
import numpy as np
import pandas as pd

from pruning_runtime.costs import processed_ratios, published_ratios
from schedule_finder.figures.allocation import LOOKS, allocation_means
from schedule_finder.figures.attention_map import rank_edges, ranked_attention
from schedule_finder.figures.held_out import held_out_results
from schedule_finder.figures.methods import base_label, is_discarded
from schedule_finder.figures.style import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
)
from schedule_finder.intervals import band
from schedule_finder.report import measured_charts
from schedule_finder.report.vega import (
    GREY,
    Spec,
    change_point_rules,
    layer_axis,
    layer_rows,
    point_axis,
    spec,
    tip,
)
from schedule_finder.signals import layer_shift, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from schedule_finder.figures.run_data import RunData


_PALETTE = (
    "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B8A200", "#8C564B", "#6A3D9A", "#E15759", "#76B7B2",
    "#A65628", "#F781BF", "#4DAF4A", "#BC80BD", "#B15928", "#1B9E77", "#7570B3", "#E7298A", "#66A61E", "#A6761D",
    "#9EBCDA", "#FDB462",
)  # fmt: skip


def staircase(data: RunData) -> Spec | None:
    """Vision tokens that each layer computes, with the range over resampled measurements."""
    schedule = data.schedule
    if schedule is None:
        return None
    num_layers, whole = schedule.backbone.num_layers, data.mean_vision or 100.0
    unit = "Vision tokens" if data.mean_vision else "Vision tokens (%)"
    table = layer_rows(range(num_layers)).assign(
        processed=whole * np.array(processed_ratios(schedule.stages, num_layers)),
        published=whole * np.array(published_ratios(schedule.stages, num_layers)),
    )
    base = alt.Chart(table).encode(x=layer_axis(num_layers), x2="end")
    y = alt.Y("processed:Q", title=unit, scale=alt.Scale(domain=[0, 1.05 * whole]))
    tooltip = [
        tip("layer", "Layer", "d"),
        tip("processed", "Computed"),
        tip("published", "Published count"),
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
        tips = [tip("low", "Lower edge"), tip("high", "Upper edge")]
        outline = alt.Chart(bands).mark_rect(color=SKY, opacity=0.45, stroke=SKY, strokeWidth=1)
        layers.append(
            outline.encode(x=layer_axis(num_layers), x2="end", y="low:Q", y2="high:Q", tooltip=tips)
        )
    return spec(alt.layer(*layers, *change_point_rules(data)), "Vision tokens by decoder layer")


def accuracy(data: RunData) -> Spec | None:
    """Score against the vision tokens that are processed, by method, with intervals."""
    results = held_out_results(data)
    if results is None:
        return None
    names = results.table.method
    table = results.table.assign(
        label=["Full model" if name == "full" else base_label(name, data.schedule) for name in names],
        variant=["discarded" if is_discarded(name) else "as the schedule" for name in names],
        **{name: 100 * results.table[name] for name in ("processed", "value", "ci_low", "ci_high")},
    )
    return accuracy_of(table, results.label)


def accuracy_of(table: pd.DataFrame, label: str) -> Spec:
    """The same from a table ``label, variant, processed, value, ci_low, ci_high``, numbers in percent.

    ``variant`` tells two curves of a label apart by their dashes and markers.
    """
    pick = alt.selection_point(fields=["label"], bind="legend")
    shown = alt.condition(pick, alt.value(1.0), alt.value(0.12))
    order = list(dict.fromkeys(table.label))
    columns = alt.ExprRef(expr="max(1, floor(width / 190))")
    legend = alt.Legend(
        orient="bottom", columns=columns, labelLimit=260, symbolOpacity=1, symbolType="circle"
    )
    scale = alt.Scale(domain=order, range=_colours(order))
    colour = alt.Color("label:N", title=None, legend=legend, scale=scale)
    variants = list(dict.fromkeys(table.variant))
    two = len(variants) > 1
    key = alt.Legend(orient="top", symbolOpacity=1, symbolFillColor=GREY) if two else None
    names = alt.Scale(domain=variants)
    title = "Dropped tokens" if two else None
    shape = alt.Shape("variant:N", title=title, legend=key, scale=names)
    dash = alt.StrokeDash("variant:N", title=title, legend=key, scale=names)
    x = alt.X(
        "processed:Q", title="Vision tokens processed (%)", scale=alt.Scale(domain=[0, 103], nice=False)
    )
    lowest = 5 * np.floor(min(table.ci_low.min(), table.value.min()) / 5)
    limits = alt.Scale(domain=[max(0.0, float(lowest)), 101], nice=False)
    y = alt.Y("value:Q", title=label, scale=limits)
    tips = [
        alt.Tooltip("label:N", title="Method"), alt.Tooltip("variant:N", title="Dropped tokens"),
        tip("value", label), tip("ci_low", "Lower"), tip("ci_high", "Upper"), tip("processed", "Processed"),
    ]  # fmt: skip
    base = alt.Chart(table).encode(x=x, color=colour, opacity=shown)
    chart = alt.layer(
        base.mark_line(size=1.5).encode(y=y, strokeDash=dash),
        base.mark_rule(size=1.2).encode(y=alt.Y("ci_low:Q", title=label), y2="ci_high:Q"),
        base.mark_point(filled=True, size=60).encode(y=y, tooltip=tips, shape=shape),
    ).add_params(pick)
    return spec(chart, f"{label} by vision tokens processed", 320)


def _colours(labels: Sequence[str]) -> list[str]:
    """Grey for the full model, blue for the schedule, and a colour of its own for each of 22 other methods."""
    others = iter(_PALETTE * (1 + len(labels) // len(_PALETTE)))
    fixed = {"Full model": GREY}
    return [fixed.get(label) or (BLUE if label.startswith("Schedule") else next(others)) for label in labels]


def allocation(data: RunData) -> Spec | None:
    """Shares of the attention on text, vision tokens and the answer while the answer is generated, by layer."""
    if data.allocation is None:
        return None
    found = allocation_means(data.allocation)
    found = found[found.queries == "answer"].assign(order=lambda table: table["keys"].map(list(LOOKS).index))
    table = found.assign(
        part=[LOOKS[name][0] for name in found["keys"]],
        interval=[f"{low:.1%} to {high:.1%}" for low, high in zip(found.low, found.high, strict=True)],
    )
    scale = alt.Scale(domain=[look[0] for look in LOOKS.values()], range=[look[1] for look in LOOKS.values()])
    legend = alt.Legend(orient="bottom", columns=2, symbolOpacity=1)
    num_layers = data.num_layers or int(table.layer.max()) + 1
    chart = alt.Chart(table).mark_bar(size=14).encode(
        x=point_axis(num_layers),
        y=alt.Y("share:Q", title="Attention", stack="zero", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%")),
        color=alt.Color("part:N", title=None, scale=scale, legend=legend),
        order=alt.Order("order:Q"),
        tooltip=[
            tip("layer", "Layer", "d"), alt.Tooltip("part:N", title="Attended to"), tip("share", "Share", ".1%"),
            alt.Tooltip("interval:N", title="95 % interval"),
        ],
    )  # fmt: skip
    return spec(chart, "Attention allocation by layer", 220)


def attention_map(data: RunData) -> Spec | None:
    """Attention of each layer to vision tokens by rank, relative to uniform attention."""
    if data.profile is None:
        return None
    layers, edges = data.profile.layers, rank_edges(round(data.profile.mean_vision))
    values = ranked_attention(spread(data.profile.maps), edges)
    bins = len(edges) - 1
    table = layer_rows(np.repeat(layers, bins)).assign(
        first=np.tile(edges[:-1] + 1, len(layers)),
        last=np.tile(edges[1:] + 1, len(layers)),
        attention=values.ravel().round(4),
    )
    low, high = np.nanquantile(values, [0.02, 0.998])
    scale = alt.Scale(
        type="log", scheme="blues", clamp=True, domain=[max(low, high / 1e3, 1e-6), max(high, 1e-5)]
    )
    tips = [
        tip("layer", "Layer", "d"), tip("first", "Rank", "d"), tip("attention", "Relative to uniform", ".2f")
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
        x=layer_axis(data.profile.num_layers), x2="end", y=rank, y2="last",
        color=alt.Color("attention:Q", scale=scale, legend=legend), tooltip=tips,
    )  # fmt: skip
    return spec(alt.layer(chart, *change_point_rules(data)), "Attention by layer and token rank", 300)


def shift(data: RunData) -> Spec | None:
    """Divergence of the attention of neighbouring layers, with its band and the change points."""
    if data.profile is None or len(data.profile.layers) < 2:
        return None
    layers = np.array(data.profile.layers)
    found = band(layer_shift(spread(data.profile.maps)))
    table = pd.DataFrame(
        {"layer": (layers[1:] + layers[:-1]) / 2, "mean": found.mean, "low": found.low, "high": found.high}
    )
    x = point_axis(data.profile.num_layers)
    base = alt.Chart(table).encode(x=x)
    tips = [
        tip("layer", "Between layers", ".1f"),
        *(tip(name, name, ".4f") for name in ("mean", "low", "high")),
    ]
    chart = alt.layer(
        base.mark_area(color=BLUE, opacity=0.25).encode(
            y=alt.Y("low:Q", title="JS divergence (bits)"), y2="high:Q"
        ),
        base.mark_line(color=BLUE, point=alt.OverlayMarkDef(size=35, color=BLUE)).encode(
            y="mean:Q", tooltip=tips
        ),
        *change_point_rules(data),
    )
    return spec(chart, "Attention shift between neighbouring layers", 220)


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
    base = alt.Chart(table).encode(x=point_axis(profile.num_layers), color=colour)
    y = alt.Y("low:Q", title="Share", scale=alt.Scale(domain=[0, 1]))
    tips = [tip("layer", "Layer", "d"), alt.Tooltip("curve:N"), tip("mean", "mean", ".3f")]
    chart = alt.layer(
        base.mark_area(opacity=0.25).encode(y=y, y2="high:Q"),
        base.mark_line(point=True).encode(
            y="mean:Q", tooltip=tips, strokeDash=alt.StrokeDash("curve:N", legend=None)
        ),
    )
    return spec(chart, "Attention on vision tokens by layer", 220)


CHARTS: dict[str, tuple[str, str, Callable[[RunData], Spec | None]]] = {
    "staircase": (
        "Schedule",
        "Blue: vision tokens that each decoder layer computes, mean over samples. Orange dashes: the count of the "
        "papers. Light blue: range over resampled measurements. Red lines: change points.",
        staircase,
    ),
    "accuracy": (
        "Accuracy and cost",
        "Held-out samples; bars are 95 % intervals. Select a method in the legend to see it alone. Dashed: dropped tokens "
        "are discarded where the schedule merges them.",
        accuracy,
    ),
    "front": ("Budgets", "The best schedule of each budget.", measured_charts.front),
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
    "allocation": (
        "Attention allocation",
        "Where the full model's attention goes while it generates the answer: mean over heads and the first held-out "
        "samples.",
        allocation,
    ),
    "sensitivity": (
        "Sensitivity",
        "Share of answers that change when one stage alone drops tokens; before: a stage before the decoder. Values below "
        "0.0001 have its colour. Point at a cell for its 95 % interval.",
        measured_charts.sensitivity,
    ),
    "loss": (
        "Loss of each layer",
        "Answer change that a layer adds when it computes a tenth of the vision tokens. Lines: 95 % intervals.",
        measured_charts.loss,
    ),
}
"""Name -> title, caption and function; None where the run lacks the data."""
