"""The schedule: what single stages do, what layers compute, and how sure the solver is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pruning_runtime.costs import processed_ratios, published_ratios, scores_before_decoder
from schedule_finder.errors import InputError
from schedule_finder.figures.run_data import RunData
from schedule_finder.figures.style import BLACK, BLUE, SINGLE, SKY, Drawing, layer_axis, legend_above

if TYPE_CHECKING:
    from pruning_runtime.schedule import Schedule
    from schedule_finder.evidence import Confidence


def staircase(data: RunData) -> Drawing | None:
    """Vision tokens layer by layer, by both counts."""
    schedule = data.schedule
    if schedule is None:
        return None
    num_layers = schedule.backbone.num_layers
    num_vision = _typical_vision(data)
    unit, whole = ("", num_vision) if num_vision else (" %", 100.0)
    table = pd.DataFrame({"layer": range(num_layers)})
    for name, ratios in (("processed", processed_ratios), ("published", published_ratios)):
        table[f"{name}_ratio"] = ratios(schedule.stages, num_layers)
        if num_vision:
            table[f"{name}_tokens"] = table[f"{name}_ratio"] * num_vision
    processed, published = whole * table.processed_ratio, whole * table.published_ratio

    cost, pre_decoder_cost = processed.mean(), ""
    if scores_before_decoder(schedule.stages, schedule.scorer.name) and schedule.budget is not None:
        cost, pre_decoder_cost = whole * schedule.budget.processed, ", first scoring included"

    def mean(value: float) -> str:
        share = f" ({value / whole:.1%})" if num_vision else ""
        return f"mean {value:.1f}{unit}{share}"

    figure = Figure(figsize=(SINGLE, 2.2), layout="constrained")
    axes = figure.subplots()
    edges = np.arange(num_layers + 1) - 0.5
    axes.stairs(processed, edges, fill=True, color=SKY, alpha=0.35)
    axes.stairs(
        processed,
        edges,
        baseline=None,
        color=BLUE,
        linewidth=1.4,
        label=f"Processed, {mean(cost)}{pre_decoder_cost}",
    )
    axes.stairs(
        published,
        edges,
        baseline=None,
        color=BLACK,
        linestyle=(0, (2, 1)),
        label=f"Published, {mean(published.mean())}",
    )
    axes.plot([-0.5, -0.5], [whole, processed[0]], color=BLUE, linewidth=1.4, clip_on=False)
    steps = [(-0.5, 1.0), *((stage.layer + 0.5, stage.keep_ratio) for stage in schedule.stages)]
    ends = [*steps[1:], (num_layers - 0.5, 0.0)]
    for (start, ratio), (end, lower) in zip(steps, ends, strict=True):
        # Room for the number: a long step, or one that falls far.
        if end - start >= 0.09 * num_layers or ratio - lower >= 0.12:
            axes.annotate(
                f"{whole * ratio:.0f}{unit}",
                (start, whole * ratio),
                xytext=(3, 2),
                textcoords="offset points",
                fontsize=7,
            )
    axes.set_ylabel("Vision tokens kept" + (" (%)" if not num_vision else ""))
    axes.set_ylim(0, 1.12 * whole)
    layer_axis(axes, num_layers)
    legend_above(figure, axes.get_legend_handles_labels(), columns=1)
    return figure, table


def confidence(data: RunData) -> Drawing | None:
    """What each layer keeps, with the band of what resampled samples would lead to."""
    schedule = data.schedule
    solver = data.evidence.solver
    if schedule is None or solver is None or solver.confidence is None:
        return None
    bands, num_layers = solver.confidence, schedule.backbone.num_layers
    table = pd.DataFrame({"layer": range(num_layers), "ratio": processed_ratios(schedule.stages, num_layers)})
    for name, ratios in (("ratio_low", bands.ratio_low), ("ratio_high", bands.ratio_high)):
        if len(ratios) != num_layers:
            raise InputError(
                f"{data.run.schedule}: {name} has {len(ratios)} entries for {num_layers} layers; schedule again"
            )
        table[name] = ratios

    figure = Figure(figsize=(SINGLE, 2.2), layout="constrained")
    axes = figure.subplots()
    edges = np.arange(num_layers + 1) - 0.5
    axes.stairs(
        100 * table.ratio_high,
        edges,
        baseline=100 * table.ratio_low,
        fill=True,
        color=SKY,
        alpha=0.45,
        label=f"{bands.level:.0%} of {bands.resamples} resamples",
    )
    axes.stairs(100 * table.ratio, edges, baseline=None, color=BLUE, linewidth=1.4, label="Schedule")
    axes.set_ylabel("Vision tokens kept (%)")
    axes.set_ylim(0, 105)
    layer_axis(axes, num_layers)
    legend_above(
        figure,
        axes.get_legend_handles_labels(),
        columns=2,
        title=_agreement(schedule, bands, solver.measured_samples),
    )
    return figure, table


def _agreement(schedule: Schedule, bands: Confidence, samples: int | None) -> str:
    """In words how many resamples lead to the schedule's layers."""
    layers = ",".join(str(stage.layer) for stage in schedule.stages)
    same = bands.layers.get(layers)
    often, most = max(bands.layers.items(), key=lambda one: one[1])
    said = f"{same or 'Few'} of {bands.resamples} resamples choose the schedule's layers"
    if same is None:
        said += f",\n{most} choose ({often})"
    if samples is not None:
        said += f"\nMeasured on {samples} samples"
    return said


def _typical_vision(data: RunData) -> float | None:
    """Vision tokens of a typical sample, None where neither profile nor schedule tells."""
    if data.profile is not None:
        return data.profile.mean_vision
    prompt = data.evidence.typical_prompt
    return None if prompt is None else prompt.vision_tokens
