"""Schedules for tests, in one line."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from pruning_runtime import Schedule, Stage, find_backbone
from pruning_runtime.schedule import BackboneIdentity, ScorerChoice


def schedule_for(
    model: PreTrainedModel, *stages: tuple[int, float], scorer: str = "text_guided", **fields: Any
) -> Schedule:
    """A schedule of ``(layer, keep_ratio)`` stages that fits ``model``."""
    backbone = find_backbone(model)
    return Schedule(
        backbone=BackboneIdentity(
            name=backbone.name, model_type=backbone.model_type, num_layers=backbone.shape.num_layers
        ),
        stages=tuple(Stage(layer=layer, keep_ratio=ratio) for layer, ratio in stages),
        scorer=ScorerChoice(name=scorer),
        **fields,
    )
