"""Typed reader of the change-point file, step 3 of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from schedule_finder.change_points.base import USED_SUPPORT, IsolatedLayer, Regime, canonical_name
from schedule_finder.errors import InputError
from schedule_finder.files import parse_json


class DetectorResult(BaseModel):
    """Result of one detector: first decoder layers of new regimes, and the reasons (JSON-able)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    change_points: list[int]
    used: list[int] | None = None
    """Those that schedules follow; None in old files, where all are."""
    isolated_layers: list[IsolatedLayer] = []
    regimes: list[Regime] = []
    evidence: dict[str, Any] = {}


class ChangePoints(BaseModel):
    """Content of ``3_change_points.json``.

    Attributes:
        default: the detector that schedules follow, one of ``detectors``.
        layers: decoder layers that were searched, rising; empty in old files.
        detectors: results by name.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    default: str
    layers: list[int] = []
    detectors: dict[str, DetectorResult]

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("detectors"), dict):
            detectors = {canonical_name(name): found for name, found in values["detectors"].items()}
            default = values.get("default")
            values = values | {"detectors": detectors}
            if isinstance(default, str):
                values["default"] = canonical_name(default)
        return values

    @model_validator(mode="after")
    def _default_is_there(self) -> ChangePoints:
        if self.default not in self.detectors:
            raise ValueError(f"no detector {self.default!r}")
        return self

    def of(self, detector: str | None = None) -> list[int]:
        """Change points that schedules follow, of ``detector``, by default the default one.

        Raises `InputError` for an unknown name.
        """
        name = canonical_name(detector or self.default)
        if name not in self.detectors:
            raise InputError(
                f"no change points of detector {name!r} (there: {', '.join(self.detectors)}); detect again"
            )
        found = self.detectors[name]
        return found.change_points if found.used is None else found.used

    @property
    def isolated(self) -> list[int]:
        """Isolated layers with enough support for schedules, of the detector that reports any."""
        return sorted(
            {
                layer.layer
                for found in self.detectors.values()
                for layer in found.isolated_layers
                if layer.support >= USED_SUPPORT
            }
        )


def read_change_points(path: Path) -> ChangePoints:
    """Read ``3_change_points.json``. Raises `InputError` where it is missing, unreadable or incomplete."""
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not there; run `adaptinfer-profile detect {path.parent}` first") from None
    except ValueError as error:
        raise InputError(f"{path}: not readable ({error}); detect again") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: holds no JSON object; detect again")
    try:
        return ChangePoints.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise InputError(f"{path}: no {field} in it; detect again") from error
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}: {field + ': ' if field else ''}{reason}; detect again") from error
