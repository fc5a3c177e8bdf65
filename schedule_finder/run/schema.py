"""Types of what a run folder says about itself: ``run.json`` and the profile's ``meta.json``.

Fields that no type here names are kept as they are. Earlier releases stated less, so most fields may be missing;
`missing_fields` names those that a command needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pruning_runtime.geometry import DecoderShape
from pruning_runtime.schedule import BackboneIdentity

RUN_OPTIONS = ("backbone", "dataset", "samples", "eval_samples", "seed", "columns")
PROFILE_FACTS = ("backbone", "shape", "layers", "dtype", "prompt_digest")


class _Document(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Options(_Document):
    backbone: str = ""
    dataset: str | list[str] = ""
    samples: int | str = 0
    eval_samples: int = 0
    seed: int = 0
    columns: dict[str, Any] = {}


class _Step(_Document):
    state: str
    seconds: float = 0.0


class _RunDocument(_Document):
    options: _Options
    steps: dict[str, _Step]


class _Backbone(_Document):
    num_layers: int


class _ProfileMeta(_Document):
    backbone: _Backbone | None = None
    layers: list[int] = []
    dtype: str = ""
    prompt_digest: str | None = None
    left_out: dict[str, Any] = {}


def problem_of_run(document: Any) -> str | None:
    """What is wrong with the content of a ``run.json``, None where nothing is."""
    return _problem(_RunDocument, document)


def problem_of_meta(meta: Any) -> str | None:
    """What is wrong with the types or the layers of a profile's ``meta.json``, None where nothing is."""
    if (problem := _problem(_ProfileMeta, meta)) is not None:
        return problem
    layers = meta.get("layers", [])
    if sorted({layer for layer in layers if layer >= 0}) != layers:
        return "`layers`: must be layer numbers in rising order"
    return None


def problem_of_searched(meta: dict[str, Any]) -> str | None:
    """What keeps a search from using a profile's ``meta.json``, None where nothing does.

    Beyond `problem_of_meta`: all of `PROFILE_FACTS` are there, and backbone, shape and layers fit each other.
    """
    if (problem := problem_of_meta(meta) or missing_fields(meta, PROFILE_FACTS)) is not None:
        return problem
    layers = meta["layers"]
    for name, kind in (("shape", DecoderShape), ("backbone", BackboneIdentity)):
        if (problem := _problem(kind, meta[name])) is not None:
            return f"`{name}`: {problem}"
    if unknown := sorted(meta["shape"].keys() - set(DecoderShape.__slots__)):
        return f"`shape`: no such size: {', '.join(unknown)}"
    depth = meta["backbone"]["num_layers"]
    if depth != meta["shape"]["num_layers"] or (layers and layers[-1] >= depth):
        return f"`layers` or `shape.num_layers` do not fit the {depth} layers of `backbone`"
    return None


def missing_fields(document: Mapping[str, Any], needed: Sequence[str]) -> str | None:
    """Which of ``needed`` are missing, as the end of an error; None where all are there."""
    missing = [name for name in needed if name not in document]
    return f"no {', '.join(missing)} in it" if missing else None


def _problem(kind: Any, document: Any) -> str | None:
    if not isinstance(document, dict):
        return "holds no JSON object"
    try:
        # Through JSON: its arrays are tuples as well.
        TypeAdapter(kind).validate_json(json.dumps(document), strict=True)
    except (ValidationError, TypeError) as error:
        if isinstance(error, TypeError):
            return str(error)
        first = error.errors(include_url=False)[0]
        return f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}"
    return None
