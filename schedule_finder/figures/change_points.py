"""Distances between layers with regimes, isolated layers and stages; the shift curve; the paper's histogram."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from pydantic import ValidationError

from schedule_finder.change_points.base import CurveEvidence, ShiftEvidence
from schedule_finder.errors import InputError
from schedule_finder.figures.run_data import need
from schedule_finder.figures.style import (
    BLACK,
    BLUE,
    GAP,
    GREEN,
    ORANGE,
    PURPLE,
    SINGLE,
    SKY,
    VERMILLION,
    Drawing,
    layer_axis,
    legend_over,
    words,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from pruning_runtime.schedule import Stage
    from schedule_finder.figures.run_data import RunData
    from schedule_finder.run.reader import DetectorResult

_E = TypeVar("_E", ShiftEvidence, CurveEvidence)
_REGIME_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)
_GREY = "#BBBBBB"
_WIDTH = 2.0
"""Of all panels in inches; the colour bar is beside the first."""


def change_points(data: RunData) -> Drawing | None:
    """Up to three panels, each where its detector has evidence; None where none has."""
    if data.detections is None:
        return None
    path, detectors = data.run.change_points, data.detections.detectors
    shift = _evidence(ShiftEvidence, detectors.get("attention_shift"), path)
    curve = _evidence(CurveEvidence, detectors.get("token_curve"), path)
    if shift is None and curve is None:
        return None
    layers = data.detections.layers or list(range((shift or curve).num_layers))  # type: ignore[union-attr]
    tables = []
    heights = [_WIDTH, 0.95] * (shift is not None) + [0.95] * (curve is not None)
    figure, panels = _panels(heights)
    num_layers = int(max(layers)) + 1
    legends: list[list[Any]] = []
    if shift is not None:
        found = detectors["attention_shift"]
        legends.append(_draw_distances(figure, panels[0], found, shift, data, num_layers))
        table, handles = _draw_shift(panels[1], found, shift, num_layers)
        tables.append(table)
        legends.append(handles)
    if curve is not None:
        table = _curve_table(detectors["token_curve"], curve, layers, path)
        legends.append(_draw_histogram(panels[-1], table, num_layers))
        tables.append(table)
    names = ["attention_shift"] * (2 * (shift is not None)) + ["token_curve"] * (curve is not None)
    for letter, name, axes, handles in zip("abc", names, panels, legends, strict=False):
        use = "schedules follow it" if name == data.detections.default else "for comparison"
        legend_over(axes, handles, columns=2, title=f"{letter}  {words(name).capitalize()} ({use})")
        edge = 0.05 / SINGLE  # of the figure: legends are wider than their panels
        left = axes.transAxes.inverted().transform(figure.transFigure.transform((edge, 0)))[0]
        if (legend := axes.get_legend()) is not None:
            legend.set_bbox_to_anchor((left, 1), transform=axes.transAxes)
    table = tables[0] if len(tables) == 1 else tables[1].merge(tables[0], how="outer")
    for name, detection in detectors.items():
        table[name] = np.isin(table.first_layer_of_new_regime, detection.change_points).astype(int)
    return figure, table


def _panels(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure and its panels of the same width, each with room for a legend above and an axis label below; inches."""
    legend, label = 0.5, 0.41
    total = sum(heights) + len(heights) * (legend + label)
    figure = Figure(figsize=(SINGLE, total))
    panels, top = [], total
    for height in heights:
        bottom = top - legend - height
        panels.append(figure.add_axes((0.5 / SINGLE, bottom / total, _WIDTH / SINGLE, height / total)))
        top = bottom - label
    return figure, panels


def _evidence(kind: type[_E], found: DetectorResult | None, path: Path) -> _E | None:
    """The evidence of a detector that searched; None where it did not, or where an old file has other facts.

    Raises `InputError` where it is damaged.
    """
    needed = {"distance", "shift"} if kind is ShiftEvidence else {"histogram", "straight_ramp"}
    if found is None or found.evidence.get("reason") or not needed & found.evidence.keys():
        return None
    known = {name: value for name, value in found.evidence.items() if name in kind.model_fields}
    try:
        need(known, sorted(needed), path, "detect again")
        return kind.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: evidence {where}: {first['msg']}; detect again") from error


def _draw_distances(
    figure: Figure,
    axes: Axes,
    found: DetectorResult,
    evidence: ShiftEvidence,
    data: RunData,
    num_layers: int,
) -> list[Any]:
    """Heatmap of all pairs of layers; regimes as boxes on the diagonal, coloured by attention pattern."""
    shown = np.full((num_layers, num_layers), np.nan)
    index = np.array(evidence.layers)
    shown[np.ix_(index, index)] = evidence.distance
    np.fill_diagonal(shown, np.nan)
    edges = np.arange(num_layers + 1) - 0.5
    high = float(np.nanquantile(shown, 0.9))
    mesh = axes.pcolormesh(
        edges, edges, np.ma.masked_invalid(shown), cmap="Greys", vmin=0, vmax=high, rasterized=True
    )
    beside = axes.inset_axes((1.03, 0, 0.045, 1))
    bar = figure.colorbar(mesh, cax=beside, extend="max")
    bar.set_label("Distance (nats)")
    bar.outline.set_linewidth(0.6)
    axes.set_aspect("equal")
    layer_axis(axes, num_layers)
    axes.set_ylim(num_layers - 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, steps=[1, 2, 4, 5, 10]))
    axes.set_ylabel("Decoder layer")
    handles: list[Any] = []
    for regime in found.regimes:
        colour = _REGIME_COLOURS[regime.cluster % len(_REGIME_COLOURS)]
        size = regime.last - regime.first + 1
        corner = (regime.first - 0.5, regime.first - 0.5)
        axes.add_patch(
            Rectangle(
                corner, size, size, fill=False, edgecolor=colour, linewidth=1.4, clip_on=False, zorder=4
            )
        )
    if found.regimes:
        handles.append(Patch(fill=False, edgecolor=BLUE, linewidth=1.4, label="Regime (colour: pattern)"))
    # Marks stand outside the matrix: isolated layers on the right edge, stages below the lower one.
    isolated = [layer.layer for layer in found.isolated_layers]
    if isolated:
        marks = axes.plot(
            isolated, isolated, "o", markersize=4, markerfacecolor="none", color=VERMILLION, zorder=6
        )
        marks[0].set_label("Isolated layer")
        handles.append(marks[0])
    return [*handles, *_mark_stages(axes, data.stages)]


def _mark_stages(axes: Axes, stages: Sequence[Stage]) -> list[Any]:
    """A mark below the matrix behind each stage's layer, and what the legend says of it."""
    for stage in stages:
        axes.plot(
            stage.layer + 0.5,
            0,
            marker="^",
            color=BLACK,
            markersize=5,
            clip_on=False,
            zorder=5,
            transform=axes.get_xaxis_transform(),
        )
    if not stages:
        return []
    return [Line2D([], [], color=BLACK, marker="^", markersize=5, linestyle="", label="Tokens are dropped")]


def _draw_shift(
    axes: Axes, found: DetectorResult, evidence: ShiftEvidence, num_layers: int
) -> tuple[pd.DataFrame, list[Any]]:
    """Distance of neighbouring layers, and what it is where nothing changes."""
    shift = evidence.shift
    assert shift is not None  # `_evidence` has seen to it
    layers, own = np.array(evidence.layers), np.array(evidence.own)
    expected = np.array(evidence.expected_shift)
    # Chance alignment of two own parts in so many dimensions: 1.96 standard deviations.
    chance = 1.96 * 2 * np.sqrt(own[1:] * own[:-1] / evidence.dimensions)
    low, high = np.maximum(expected - chance, 0), expected + chance
    mean = np.array(shift.mean, dtype=float)
    middle = (layers[1:] + layers[:-1]) / 2
    bounds = np.repeat(middle, 2) + np.tile([-0.5, 0.5], len(middle))
    band = axes.fill_between(
        bounds,
        np.repeat(low, 2),
        np.repeat(high, 2),
        color=_GREY,
        alpha=0.7,
        linewidth=0,
        label="Without a change",
    )
    line = axes.plot(
        middle, mean, color=BLACK, marker="o", markersize=2, linewidth=0.9, label="Neighbours' distance"
    )
    interval = np.array([shift.low, shift.high], dtype=float)
    axes.fill_between(middle, *interval, color=BLACK, alpha=0.25, linewidth=0)
    handles: list[Any] = [line[0], band]
    for layer in found.change_points:
        mark = axes.axvline(
            layer - 0.5, color=VERMILLION, linestyle=(0, (3, 1.5)), linewidth=1.1, label="Change point"
        )
        handles += [mark] * (len(handles) == 2)
    axes.set_ylim(0, 1.08 * max(float(np.nanmax(mean)), float(high.max())))
    axes.set_ylabel("Distance (nats)")
    layer_axis(axes, num_layers)
    table = pd.DataFrame(
        {
            "first_layer_of_new_regime": layers[1:],
            "distance_from_layer_before": mean,
            "distance_low": interval[0],
            "distance_high": interval[1],
            "without_a_change": expected,
            "without_a_change_low": low,
            "without_a_change_high": high,
        }
    )
    return table, handles


def _curve_table(
    found: DetectorResult, evidence: CurveEvidence, layers: Sequence[int], path: Path
) -> pd.DataFrame:
    def percent(counts: Sequence[float]) -> np.ndarray:
        if len(counts) != len(layers):
            raise InputError(f"{path}: {len(counts)} numbers for {len(layers)} layers; detect again")
        return np.asarray(100 * np.array(counts[:-1], dtype=float) / max(evidence.num_curves, 1))

    # Entry i counts breaks after the i-th layer: the new regime begins with the next one.
    table = pd.DataFrame(
        {
            "first_layer_of_new_regime": np.array(layers[1:]),
            "breaks_percent": percent(evidence.histogram),
            "straight_ramp_percent": percent(evidence.straight_ramp),
        }
    )
    if evidence.shuffled_layers:
        table["shuffled_layers_percent"] = percent(evidence.shuffled_layers)
        table["threshold_percent"] = table.shuffled_layers_percent + 100 * evidence.excess_threshold
    return table.assign(token_curve=np.isin(table.first_layer_of_new_regime, found.change_points).astype(int))


def _draw_histogram(axes: Axes, table: pd.DataFrame, num_layers: int) -> list[Any]:
    first = table.first_layer_of_new_regime
    handles: list[Any] = [
        axes.bar(first, table.breaks_percent, 0.75, color=SKY, label="Curves that break here")
    ]
    if "shuffled_layers_percent" in table:
        handles += axes.plot(
            first,
            table.threshold_percent,
            color=BLACK,
            linewidth=0.9,
            linestyle=":",
            label="Limit (shuffled layers)",
        )
    for number, layer in enumerate(first[table.straight_ramp_percent > 0]):
        # The detector reads no break within one layer of where a straight ramp breaks.
        ramp = axes.axvspan(
            layer - 1.5, layer + 1.5, color=GAP, linewidth=0, zorder=0, label="Near a ramp's own break"
        )
        handles += [ramp] * (number == 0)
    own = table[table.token_curve == 1]
    if len(own):
        top = axes.get_ylim()[1]
        handles += axes.plot(
            own.first_layer_of_new_regime,
            own.breaks_percent + 0.06 * top,
            "*",
            color=BLACK,
            markersize=6,
            markeredgewidth=0,
            label="Change: peak over limit",
        )
        axes.set_ylim(0, 1.12 * top)
    axes.set_ylabel("Tokens' curves (%)")
    layer_axis(axes, num_layers, "First layer of the new regime")
    return handles
