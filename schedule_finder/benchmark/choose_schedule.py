"""The schedule to measure: a named one, a preset that fits, or one scaled to another depth."""

from __future__ import annotations

from pathlib import Path

from pruning_runtime import Schedule, ScheduleError, Stage
from pruning_runtime.backbone import Backbone
from pruning_runtime.schedule import BackboneIdentity
from schedule_finder.models.shapes import is_shape

DEFAULT_PRESET = "adaptinfer/llava-1.5-7b-64"


def choose_schedule(name: str | None, backbone: Backbone) -> tuple[Schedule, str]:
    """A schedule for this backbone, and one line that states its origin.

    A preset for another depth or family is scaled: its layers to the same fractions of the depth, its ratios unchanged.
    So is any schedule on a ``shape:`` backbone, which has random weights.

    Args:
        name: a schedule file or a preset; None: the published preset that fits, or else AdaptInfer's for LLaVA-1.5-7B.
        backbone: to be measured.

    Raises:
        ScheduleError: no such file or preset, or a file made for another backbone.
    """
    presets = Schedule.presets()
    if name is None:
        ours = [preset for preset in presets if preset.startswith("adaptinfer/")]
        fitting = [preset for preset in ours if _fits(Schedule.preset(preset), backbone)]
        name = min(fitting, key=lambda preset: (not preset.endswith("-64"), preset), default=DEFAULT_PRESET)
    is_preset = name in presets and not Path(name).exists()
    schedule = Schedule.preset(name) if is_preset else Schedule.load(name)
    if _fits(schedule, backbone):
        return schedule, name
    if not (is_preset or is_shape(backbone.name)):
        schedule.check_backbone(backbone)
    made_for = f"{schedule.backbone.name}, {schedule.backbone.num_layers} layers"
    return _scaled(
        schedule, backbone
    ), f"{name} (made for {made_for}; scaled to the same fractions of the depth)"


def _fits(schedule: Schedule, backbone: Backbone) -> bool:
    try:
        schedule.check_backbone(backbone)
    except ScheduleError:
        return False
    return True


def _scaled(schedule: Schedule, backbone: Backbone) -> Schedule:
    depth = backbone.shape.num_layers
    stages: dict[int, Stage] = {}
    for stage in schedule.stages:
        layer = stage.layer
        if layer >= 0:
            layer = min(round(layer * depth / schedule.backbone.num_layers), depth - 2)
        stages[layer] = Stage(
            layer=layer, keep_ratio=stage.keep_ratio
        )  # of two stages at one layer, the later one is kept
    identity = BackboneIdentity(name=backbone.name, model_type=backbone.model_type, num_layers=depth)
    return Schedule(
        backbone=identity,
        stages=tuple(stages.values()),
        scorer=schedule.scorer,
        positions=schedule.positions,
        image_newlines=schedule.image_newlines,
        dropped_tokens=schedule.dropped_tokens,
    )
