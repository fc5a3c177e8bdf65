"""The schedule: vision tokens of every layer, and how certain they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from pruning_runtime.costs import processed_ratios, published_ratios, scores_before_decoder
from schedule_finder.errors import InputError
from schedule_finder.figures.style import BLACK, BLUE, SINGLE, SKY, Drawing, layer_axis, legend_above

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from pruning_runtime.schedule import Schedule, Stage
    from schedule_finder.evidence import Confidence
    from schedule_finder.figures.run_data import RunData


def staircase(data: RunData) -> Drawing | None:
    """Vision tokens per layer, processed and by the published count, with the band of resampled schedules."""
    schedule = data.schedule
    if schedule is None:
        return None
    num_layers, num_vision = schedule.backbone.num_layers, data.mean_vision
    unit, whole = ("", num_vision) if num_vision else (" %", 100.0)
    table = pd.DataFrame({"layer": range(num_layers)})
    for name, ratios in (("processed", processed_ratios), ("published", published_ratios)):
        table[f"{name}_ratio"] = ratios(schedule.stages, num_layers)
        if num_vision:
            table[f"{name}_tokens"] = table[f"{name}_ratio"] * num_vision
    cost, suffix = table.processed_ratio.mean(), ""
    if scores_before_decoder(schedule.stages, schedule.scorer.name) and schedule.budget is not None:
        cost, suffix = schedule.budget.processed, ", pre-decoder scoring included"

    def mean(ratio: float) -> str:
        return f"mean {whole * ratio:.1f}{unit}" + (f" ({ratio:.1%})" if num_vision else "")

    figure = Figure(figsize=(SINGLE, 2.4), layout="constrained")
    axes = figure.subplots()
    edges = np.arange(num_layers + 1) - 0.5
    title = _draw_band(axes, data, table, edges, whole)
    processed, published = whole * table.processed_ratio, whole * table.published_ratio
    label = f"Processed, {mean(cost)}{suffix}"
    axes.stairs(processed, edges, baseline=None, color=BLUE, linewidth=1.4, label=label)
    label = f"Published count, {mean(table.published_ratio.mean())}"
    axes.stairs(published, edges, baseline=None, color=BLACK, linestyle=(0, (2, 1)), label=label)
    axes.plot([-0.5, -0.5], [whole, processed[0]], color=BLUE, linewidth=1.4, clip_on=False)
    _label_steps(axes, schedule, whole, unit)
    axes.set_ylabel("Vision tokens kept" + (" (%)" if not num_vision else ""))
    axes.set_ylim(0, 1.12 * whole)
    layer_axis(axes, num_layers)
    legend_above(figure, axes.get_legend_handles_labels()[0], columns=1, title=title)
    return figure, table


def _label_steps(axes: Axes, schedule: Schedule, whole: float, unit: str) -> None:
    """The number of tokens on every step that has room for it."""
    num_layers = schedule.backbone.num_layers
    steps = [(-0.5, 1.0), *((stage.layer + 0.5, stage.keep_ratio) for stage in schedule.stages)]
    ends = [*steps[1:], (num_layers - 0.5, 0.0)]
    for (start, ratio), (end, lower) in zip(steps, ends, strict=True):
        if end - start >= 0.09 * num_layers or ratio - lower >= 0.12:
            text, at = f"{whole * ratio:.0f}{unit}", (start, whole * ratio)
            axes.annotate(text, at, xytext=(3, 2), textcoords="offset points", fontsize=7)


def _draw_band(axes: Axes, data: RunData, table: pd.DataFrame, edges: np.ndarray, whole: float) -> str | None:
    """Draw the band of resampled schedules and add it to ``table``; returns how many of them agree."""
    solver = data.evidence.solver
    if solver is None or solver.confidence is None:
        return None
    bands = solver.confidence
    for name, ratios in (("ratio_low", bands.ratio_low), ("ratio_high", bands.ratio_high)):
        if len(ratios) != len(table):
            raise InputError(
                f"{data.run.schedule}: {name} has {len(ratios)} entries for {len(table)} layers; schedule again"
            )
        table[name] = ratios
    label = f"{bands.level:.0%} band of {bands.resamples} resamples"
    low, high = whole * table.ratio_low, whole * table.ratio_high
    # The edge shows a band of no height: all resamples agree there.
    look: dict[str, Any] = {"facecolor": to_rgba(SKY, 0.45), "edgecolor": SKY, "linewidth": 0.9}
    axes.stairs(high, edges, baseline=low, fill=True, label=label, **look)
    return _agreement(data.stages, bands, solver.measured_samples)


def _agreement(stages: Sequence[Stage], bands: Confidence, samples: int | None) -> str:
    """How many resamples lead to the schedule's layers, in words."""
    same = bands.layers.get(",".join(str(stage.layer) for stage in stages), 0)
    often, most = max(bands.layers.items(), key=lambda one: one[1])
    text = f"{same} of {bands.resamples} resamples choose the schedule's layers"
    if most > same:
        text += f",\n{most} choose {_layers_in_words(often)}"
    return text if samples is None else f"{text}\nMeasured on {samples} samples"


def _layers_in_words(text: str) -> str:
    """``1,4`` as "layers 1 and 4"."""
    *first, last = text.split(",")
    if not last:
        return "no stage"
    return f"layers {', '.join(first)} and {last}" if first else f"layer {last}"
