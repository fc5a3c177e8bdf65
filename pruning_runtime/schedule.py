"""The schedule file: what to prune, where, and why; format ``adaptinfer-schedule``, version 2.

The runtime owns the format, so that an engine can load a schedule without any of the tools that
found it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pruning_runtime.scorers import make_scorer

if TYPE_CHECKING:
    from pruning_runtime.backbone import Backbone

FORMAT: Literal["adaptinfer-schedule"] = "adaptinfer-schedule"
VERSION: Literal[2] = 2
PRESET_FOLDER = Path(__file__).parent / "presets"

BudgetKind = Literal["processed", "published", "flops", "kv", "latency"]
DroppedTokens = Literal["discard", "merge"]
Ratio = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False, strict=True)]
Charged = Annotated[float, Field(ge=0.0, le=1.5, allow_inf_nan=False, strict=True)]
"""A cost that passes 1 where scoring before the decoder takes more than is saved."""


class ScheduleError(ValueError):
    """A schedule that cannot be used; the message names the field, its value and what is allowed."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Stage(_Part):
    """One pruning step.

    Tokens are scored with the attention of decoder layer ``layer`` and leave after it; ``-1`` means
    before the decoder, where a scorer that needs attention gets that of layer 0: its queries and keys are
    projected for all tokens, and the layer then runs on those that are left. ``keep_ratio`` is the fraction
    of the sample's *original* vision tokens that are still there afterwards. ``keep_tokens`` is for display
    only.
    """

    layer: int = Field(ge=-1, strict=True)
    keep_ratio: Ratio
    keep_tokens: int | None = Field(default=None, ge=0)

    def kept(self, num_vision: int) -> int:
        """Number of vision tokens that a sample with ``num_vision`` of them keeps (half rounds up)."""
        return math.floor(self.keep_ratio * num_vision + 0.5)


class ScorerChoice(_Part):
    """Which rule scores vision tokens, and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> Self:
        make_scorer(self.name, self.options)
        return self


class BackboneIdentity(_Part):
    """The backbone that a schedule was found on.

    ``config_digest`` covers the decoder's geometry only, so that it is the same under every
    transformers version; None in presets, which state no more than a family and a depth.
    """

    name: str
    model_type: str
    num_layers: int = Field(ge=1)
    revision: str | None = None
    config_digest: str | None = None


class Budget(_Part):
    """What a schedule costs, as fractions of the unpruned backbone's prefill of a typical prompt.

    ``processed``: vision tokens that layers compute; ``published``: the same by the papers' count; ``flops`` of
    the decoder's layers; ``kv``: cache entries; ``latency``: milliseconds of the decoder, measured on one device,
    which may exceed 1 where pruning does not pay.
    """

    kind: BudgetKind
    target: Charged
    processed: Charged
    published: Ratio
    flops: Charged | None = None
    kv: Ratio | None = None
    latency: Annotated[float, Field(ge=0.0, allow_inf_nan=False, strict=True)] | None = None


class Schedule(_Part):
    """Stages, scorer and position policy for one backbone, with budget, evidence and provenance.

    ``positions``: with "original" every token keeps its number. With "renumbered" the tokens that are left in
    a row are counted anew without gaps after each stage that drops anything, in every layer behind it, and
    generated tokens go on from there; under M-RoPE a token then has one number in all sections, as text has.
    Layers before the first stage, and what a sliding window or a chunk can reach, go by the original numbers.

    ``image newlines``: what becomes of learned vectors at vision tokens that carry no content but mark the end of a
    row of patches, say (LLaVA-NeXT's `image_newline`). "protected": they stay before any other vision token,
    in reading order where not all can, and count as kept tokens like any other, so numbers of tokens do not
    change; a stage that keeps hardly more tokens than there are image newlines keeps hardly any content. "ranked":
    they compete by their scores. Backbones without image newlines prune alike under both.

    ``residual``: what dropped tokens leave behind. "none": nothing; attention that rested on them moves to those
    that are left. "merged": of the tokens that a stage keeps, one stands for all that are gone: its state becomes
    their mean, and later attention counts it as often as there are tokens in it (proportional attention, as in
    token merging, arXiv 2210.09461). Token counts and costs are the same. Needs a kernel that takes additive
    masks (sdpa or eager).
    """

    format: Literal["adaptinfer-schedule"] = FORMAT
    version: Literal[2] = VERSION
    backbone: BackboneIdentity
    stages: tuple[Stage, ...]
    scorer: ScorerChoice
    positions: Literal["original", "renumbered"] = "original"
    image_newlines: Literal["protected", "ranked"] = "protected"
    dropped_tokens: DroppedTokens = "discard"
    budget: Budget | None = None
    evidence: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)

    @field_validator("stages")
    @classmethod
    def _ordered(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        for before, after in itertools.pairwise(stages):
            if after.layer <= before.layer:
                raise ValueError(
                    f"layers must increase from stage to stage, found {before.layer} then {after.layer}"
                )
            if after.keep_ratio > before.keep_ratio:
                raise ValueError(
                    "keep_ratio is relative to the original tokens and cannot rise, found "
                    f"{before.keep_ratio} at layer {before.layer}, then {after.keep_ratio} at layer {after.layer}"
                )
        return stages

    @model_validator(mode="after")
    def _within_depth(self) -> Self:
        last_useful = self.backbone.num_layers - 2
        for stage in self.stages:
            if stage.layer > last_useful:
                raise ValueError(
                    f"stages: layer {stage.layer} is out of range; tokens must leave before the last of "
                    f"{self.backbone.num_layers} layers, so -1 to {last_useful} is allowed"
                )
        return self

    @classmethod
    def from_json(cls, text: str, *, source: str = "schedule") -> Schedule:
        """Parse and check a schedule; ``source`` names it in errors. Raises `ScheduleError`."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ScheduleError(
                f"{source}: not a complete JSON document ({error}); write it again with `adaptinfer-profile schedule`"
            ) from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ScheduleError(f"{source}: not a schedule file; its `format` must be {FORMAT!r}")
        if type(document.get("version")) is not int or document["version"] not in (1, VERSION):
            raise ScheduleError(
                f"{source}: version {document.get('version')!r} is not supported; this release reads 1 and {VERSION}"
            )
        if document["version"] == 1:
            document = _upgraded(document, source)
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise ScheduleError(f"{source}: {_first_problem(error)}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schedule:
        """Read a schedule file. Raises `ScheduleError` where it is missing, truncated or wrong."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ScheduleError(f"{path}: cannot be read ({error})") from error
        return cls.from_json(text, source=str(path))

    @classmethod
    def preset(cls, name: str) -> Schedule:
        """A published schedule, for example ``adaptinfer/llava-1.5-7b-64``; see `presets`."""
        path = PRESET_FOLDER / f"{name}.json"
        if name not in cls.presets():
            raise ScheduleError(f"no preset {name!r}; known: {', '.join(cls.presets())}")
        return cls.load(path)

    @staticmethod
    def presets() -> list[str]:
        """Names of all published schedules that ship with the runtime."""
        return sorted(
            path.relative_to(PRESET_FOLDER).with_suffix("").as_posix()
            for path in PRESET_FOLDER.rglob("*.json")
        )

    def to_json(self) -> str:
        """The file's text: indented JSON with a final newline."""
        return self.model_dump_json(indent=2, exclude_none=True) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file in one step: a reader sees the old or the new one, never half of it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(self.to_json(), encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise `ScheduleError` unless this schedule was made for a backbone of this shape."""
        mine, found = self.backbone, backbone
        differences = [
            f"{field} is {actual!r}, the schedule was made for {wanted!r}"
            for field, wanted, actual in (
                ("model_type", mine.model_type, found.model_type),
                ("num_layers", mine.num_layers, found.shape.num_layers),
                ("config_digest", mine.config_digest, found.config_digest),
            )
            if wanted is not None and wanted != actual
        ]
        if differences:
            raise ScheduleError(
                f"schedule for {mine.name!r} does not fit this backbone: {'; '.join(differences)}. "
                "Profile this backbone, or load the schedule that belongs to it"
            )


_RENAMED = {"residual": "dropped_tokens", "separators": "image_newlines"}
_RENAMED_VALUES = {"residual": {"none": "discard", "merged": "merge"}}


def _upgraded(document: dict[str, Any], source: str) -> dict[str, Any]:
    """A version 1 document in the words of version 2. Raises `ScheduleError`."""
    upgraded = dict(document, version=VERSION)
    for old, new in _RENAMED.items():
        if new in upgraded:
            raise ScheduleError(f"{source}: field `{new}` belongs to version 2, this file says version 1")
        if old in upgraded:
            value = upgraded.pop(old)
            known = _RENAMED_VALUES.get(old)
            if known is not None and value not in known:
                raise ScheduleError(
                    f"{source}: field `{old}` is {value!r}; version 1 knows {', '.join(known)}"
                )
            upgraded[new] = value if known is None else known[value]
    return upgraded


def _first_problem(error: ValidationError) -> str:
    """One line for the first finding: field, value, what is allowed."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(" ".join(str(part).split()) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    where = f"field `{field}`: " if field else ""
    value = problem["input"]
    shown = f" (found {value!r})" if isinstance(value, (str, int, float, bool, type(None))) else ""
    return f"{where}{message}{shown}"
