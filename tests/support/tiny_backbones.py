"""A tiny family as a loaded backbone: the engines run it on prompts of its own, whatever the samples hold."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pruning_runtime import find_backbone
from pruning_runtime.schedule import BackboneIdentity
from schedule_finder.models.loading import LoadedBackbone


@dataclass(frozen=True)
class TinyBackbone(LoadedBackbone):
    """`LoadedBackbone` without a processor: the family itself makes the inputs, one image per sample."""

    family: Any = None

    def inputs(self, samples: list[Any]) -> dict[str, Tensor]:
        """A left-padded batch; the ids of the samples seed it."""
        seed = zlib.crc32(" ".join(sample.id for sample in samples).encode())
        return self.family.batch((1,) * len(samples), seed=seed)


def tiny_backbone(family: Any, name: str) -> TinyBackbone:
    """The family, built and ready to profile."""
    backbone = find_backbone(family.build())
    if getattr(family, "needs_mask", False):
        backbone = replace(backbone, vision_token_ids=family.vision_ids)
    identity = BackboneIdentity(
        name=name,
        model_type=backbone.model_type,
        num_layers=backbone.shape.num_layers,
        config_digest=backbone.config_digest,
    )
    processor: Any = SimpleNamespace(chat_template="{{ messages }}")
    return TinyBackbone(backbone, processor, identity, torch.device("cpu"), torch.float32, family)
