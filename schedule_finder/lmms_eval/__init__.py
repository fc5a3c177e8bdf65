"""Plug-in for lmms-eval 0.7: the model ``adaptinfer`` runs any of its Hugging Face chat models with a schedule.

    lmms_eval --model adaptinfer --model_args base=llava_hf,pretrained=PATH,schedule=4_schedule.json --tasks pope

lmms-eval finds `manifest` through the entry-point group ``lmms_eval.models``, and loads every plug-in whenever it
starts: one that fails to load disables all others. So nothing heavy is imported here, and nothing of lmms-eval before
it asks.
"""

from __future__ import annotations

from typing import Any

MODEL_NAME = "adaptinfer"


def manifest() -> Any:
    """The ``ModelManifest`` of the plug-in."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_NAME, chat_class_path="schedule_finder.lmms_eval.model.AdaptInfer")
