"""Backbones by shape: stock classes with published dimensions and random weights, for latency and memory only.

Their attention is meaningless, so they are neither profiled nor evaluated. They are built on their device and in
their precision, and need no download and no processor.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.initialization import no_init_weights

from schedule_finder.errors import InputError

PREFIX = "shape:"
RANDOM_WEIGHTS = "random weights: latency and memory only"
"""Text that every output about such a backbone contains."""
_FILE = Path(__file__).with_name("shapes.json")
_WEIGHT_SPREAD = 0.02


def is_shape(name: str) -> bool:
    """Whether a backbone's name asks for a shape instead of a checkpoint."""
    return name.startswith(PREFIX)


@cache
def shapes() -> dict[str, dict[str, Any]]:
    """All shapes by name (without ``shape:``): ``source``, ``billion_parameters`` and the stock ``config``."""
    return json.loads(_FILE.read_text(encoding="utf-8"))


def build_shape(name: str, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> PreTrainedModel:
    """A stock model of a published shape with random weights, made on ``device`` in ``dtype``.

    Weights are normal with a standard deviation of 0.02, norms are ones and biases zeros, so that activations stay
    finite. Attention runs through sdpa.

    Args:
        name: ``shape:llava-1.5-7b``, for example.
        device: where the model is made; nothing is made elsewhere first.
        dtype: of all weights.
        seed: of the weights; the same numbers come out on the same kind of device only.

    Raises:
        InputError: there is no such shape, or it does not fit into the device's memory.
    """
    known = shapes()
    if name.removeprefix(PREFIX) not in known:
        raise InputError(
            f"backbone {name!r}: no such shape; known: {', '.join(PREFIX + one for one in known)}"
        )
    settings = dict(known[name.removeprefix(PREFIX)]["config"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    try:
        # No initialization by the class: for billions of weights it takes minutes.
        with torch.device(device), no_init_weights():
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            )
        _fill(model, torch.Generator(device).manual_seed(seed))
    except torch.OutOfMemoryError as error:
        raise InputError(f"backbone {name!r} does not fit into the memory of {device}: {error}") from error
    model.config.name_or_path = name
    return model.eval()


def _fill(model: PreTrainedModel, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, _WEIGHT_SPREAD, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
