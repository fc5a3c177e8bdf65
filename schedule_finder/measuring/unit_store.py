"""Finished units of a long measurement on disk, so that a killed process loses only the unit it was at.

A unit is one forward pass or generation over one batch. Its identity holds everything its result depends on: the
model (`model_digest`), the batch (`inputs_digest`), and the key that the caller gives.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from schedule_finder.files import parse_json, writing
from schedule_finder.models.loading import LoadedBackbone

_SAMPLED_VALUES = 16
"""Of each parameter, for the digest of a model's weights."""


class UnitStore:
    """Results by key, in one file per context; every result is written as soon as it is there.

    The file has a line per unit. A line that a killed process left half-written is ignored, and the unit is measured
    again.

    Args:
        folder: where the files are; None keeps nothing.
        context: what all units depend on, JSON-able. Another context has another file.
    """

    def __init__(self, folder: Path | None, context: Mapping[str, Any]) -> None:
        self._context = context
        self._path = None if folder is None else folder / f"{_hash(_text(context))[:16]}.jsonl"
        self._units: dict[str, Any] = {}
        self._begun = False
        if self._path is not None and self._path.exists():
            self._units = _read_units(self._path)

    def get(self, key: Any) -> Any | None:
        """The result of a unit, None where it was not measured yet."""
        return self._units.get(_text(key))

    def put(self, key: Any, result: Any) -> None:
        """Keep a result, JSON-able. Raises `InputError` where it cannot be written."""
        if self._path is None:
            return
        text = json.dumps({"key": key, "result": result}) + "\n"
        if not self._begun:
            # The line break ends a line that a killed process left half-written.
            text = ("\n" if self._path.exists() else json.dumps({"context": self._context}) + "\n") + text
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        self._units[_text(key)] = result
        self._begun = True


def model_digest(loaded: LoadedBackbone) -> dict[str, Any]:
    """What a model's numbers depend on: configuration, weights, precision, device and library versions."""
    return {
        "backbone": loaded.identity.model_dump(exclude={"name"}),
        "weights": weights_digest(loaded.backbone.model),
        "attention": loaded.backbone.text_model.config._attn_implementation,
        "dtype": str(loaded.dtype),
        "device": str(loaded.device.type),
        "prompt": loaded.prompt_digest,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def weights_digest(model: nn.Module) -> str:
    """Hash of a few evenly spread values of every parameter and its shape.

    Parameters that are not in memory (offloaded by accelerate) count by shape only.
    """
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta" and parameter.numel():
            flat = parameter.detach().reshape(-1)
            places = torch.linspace(0, len(flat) - 1, _SAMPLED_VALUES, dtype=torch.float64).long()
            found.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def inputs_digest(inputs: Mapping[str, Tensor]) -> str:
    """Hash of a batch's tensors: token ids, pixels, masks, in any precision."""
    found = hashlib.sha256()
    for name, value in sorted(inputs.items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _read_units(path: Path) -> dict[str, Any]:
    units = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            document = parse_json(line)
            units[_text(document["key"])] = document["result"]
        except (ValueError, KeyError, TypeError):
            continue  # the context, an empty line, or a line that a killed process cut off
    return units


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
