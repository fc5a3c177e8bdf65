"""Models that accelerate spreads over a cpu and a disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.tiny_models import LAYERS


def device_map(model: PreTrainedModel) -> dict[str, str]:
    """Every second decoder layer, the rotary tables and the last norm on the disk, all else on the cpu."""
    decoder, place = model.get_decoder(), {}
    name_of = {module: name for name, module in model.named_modules()}
    for layer in range(LAYERS):
        place[name_of[decoder.layers[layer]]] = "disk" if layer % 2 else "cpu"
    place[name_of[decoder.norm]] = place[name_of[decoder.rotary_emb]] = "disk"
    # Other modules as whole as they can be.
    for name, module in model.named_modules():
        inside = any(name == there or name.startswith(f"{there}.") for there in place)
        above = any(there.startswith(f"{name}.") for there in place)
        if name and not inside and not above and not isinstance(module, torch.nn.ModuleList):
            place[name] = "cpu"
    return place


def dispatched(model: PreTrainedModel, folder: Path, **options: Any) -> PreTrainedModel:
    """The same model, spread over cpu and disk."""
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(
        model, device_map(model), main_device="cpu", offload_dir=folder, force_hooks=True, **options
    )
