"""The schedule file: format ``adaptinfer-schedule``, version 2; version 1 is read too.

The runtime owns the format, so that an engine can load a schedule without the tools that found it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pruning_runtime.display import html_table, percent, stage_name
from pruning_runtime.errors import ScheduleError
from pruning_runtime.scorers import Scorer, make_scorer

if TYPE_CHECKING:
    from pruning_runtime.backbone import Backbone

FORMAT: Literal["adaptinfer-schedule"] = "adaptinfer-schedule"
VERSION: Literal[2] = 2
PRESET_FOLDER = Path(__file__).parent / "presets"

BudgetKind = Literal["processed", "published", "flops", "kv", "latency"]
DroppedTokens = Literal["discard", "merge"]
Ratio = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False, strict=True)]
Charged = Annotated[float, Field(ge=0.0, le=1.5, allow_inf_nan=False, strict=True)]
"""A cost; above 1 if scoring before the decoder costs more than pruning saves."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScorerChoice(_Part):
    """A scorer by name, and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> Self:
        make_scorer(self.name, self.options)
        return self


class Stage(_Part):
    """One pruning step.

    Attributes:
        layer: tokens are scored with this decoder layer and leave after it. ``-1`` is before the decoder; there an
            attention scorer gets layer 0's queries and keys of all tokens, and layer 0 then runs on the kept ones.
        keep_ratio: fraction of the sample's *original* vision tokens that are left after the stage.
        keep_tokens: for display only.
        scorer: of this stage; None: the schedule's.
    """

    layer: int = Field(ge=-1, strict=True)
    keep_ratio: Ratio
    keep_tokens: int | None = Field(default=None, ge=0)
    scorer: ScorerChoice | None = None

    def kept(self, num_vision: int) -> int:
        """Vision tokens that a sample with ``num_vision`` of them keeps (half rounds up)."""
        return math.floor(self.keep_ratio * num_vision + 0.5)


class BackboneIdentity(_Part):
    """The backbone that a schedule was found on.

    ``config_digest`` covers the decoder's geometry only, so it does not depend on the transformers version. It is None
    in presets, which state a family and a depth only.

    ``fingerprint``: hashes of the checkpoint's whole configuration and of its weights, where they are known. It tells
    the tools that find schedules that a checkpoint has changed. The runtime does not check it: it gets a model in
    memory, not the files that the hashes are of, and a fine-tuned model of the same shape may use the schedule.
    """

    name: str
    model_type: str
    num_layers: int = Field(ge=1)
    revision: str | None = None
    config_digest: str | None = None
    fingerprint: dict[str, str] | None = None


class Budget(_Part):
    """What a schedule costs, as fractions of the unpruned backbone's prefill of a typical prompt.

    ``processed``: vision tokens that layers compute. ``published``: the count of the papers. ``flops``: of the decoder's
    layers. ``kv``: cache entries. ``latency``: milliseconds of the decoder, measured on one device; it may exceed 1.
    """

    kind: BudgetKind
    target: Charged
    processed: Charged
    published: Ratio
    flops: Charged | None = None
    kv: Ratio | None = None
    latency: Annotated[float, Field(ge=0.0, allow_inf_nan=False, strict=True)] | None = None


class Schedule(_Part):
    """Stages, scorer and policies for one backbone, with budget, evidence and provenance.

    Attributes:
        backbone: the model that the schedule is for.
        stages: layers increase, keep ratios do not.
        scorer: of all stages without a scorer of their own.
        positions: "original": every token keeps its position. "renumbered": after each stage that drops tokens, the
            tokens of a row get consecutive positions in all later layers, and generated tokens follow them; under
            M-RoPE such a token has one position in all sections, as text has. Sliding windows and chunks use the
            original positions under both.
        image_newlines: learned vectors at vision tokens that mark the end of a row of patches (LLaVA-NeXT's
            `image_newline`). "protected": they rank above all other vision tokens and count as kept tokens; a stage
            that keeps few more tokens than there are newlines keeps little content. "ranked": they are ranked by
            score. Backbones without such vectors give the same result under both.
        dropped_tokens: "discard": dropped tokens are removed. "merge": each stage merges them into one kept token;
            its state becomes their mean, and later attention counts it once per merged token (proportional attention
            of token merging, arXiv 2210.09461). Token counts and costs are the same. Needs the sdpa or eager kernel.
        budget: costs; None if they were not computed.
        evidence: why the stages were chosen; written by the search, not read by the runtime.
        provenance: versions and commands.
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

    def __repr__(self) -> str:
        """One line: backbone, stages, scorer and cost."""
        stages = ", ".join(f"{stage_name(stage.layer)} {percent(stage.keep_ratio)}" for stage in self.stages)
        cost = f", {percent(self.budget.processed)} processed" if self.budget else ""
        rule = f"{self.scorer.name}, {self.dropped_tokens}"
        return f"<Schedule {self.backbone.name}: {stages or 'no stages'} ({rule}{cost})>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """A table of the stages, for notebooks."""
        rows = [
            (
                stage_name(stage.layer),
                percent(stage.keep_ratio),
                "" if stage.keep_tokens is None else stage.keep_tokens,
                (stage.scorer or self.scorer).name,
            )
            for stage in self.stages
        ]
        note = f"{self.backbone.num_layers} decoder layers; dropped tokens: {self.dropped_tokens}"
        if self.budget is not None:
            note += f"; {percent(self.budget.processed)} of the vision tokens processed"
        return html_table(
            f"Schedule for {self.backbone.name}", ("Stage", "Kept", "Tokens", "Scorer"), rows, note
        )

    @classmethod
    def of(cls, given: Schedule | str | os.PathLike[str]) -> Schedule:
        """A schedule as it is, or the one that a file or the name of a preset stands for. Raises `ScheduleError`."""
        if isinstance(given, Schedule):
            return given
        name = os.fspath(given)
        if not Path(name).is_file() and name in cls.presets():
            return cls.preset(name)
        return cls.load(name)

    @classmethod
    def from_json(cls, text: str, *, source: str = "schedule") -> Schedule:
        """Parse and check a schedule; ``source`` names it in errors. Raises `ScheduleError`."""
        try:
            document = json.loads(text)
            # Half of a surrogate pair is valid JSON, and no text that could be written again.
            json.dumps(document, ensure_ascii=False).encode()
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
        except FileNotFoundError:
            raise ScheduleError(
                f"{path}: there is no such file; write it with `adaptinfer-profile schedule {path.parent}`"
            ) from None
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

    def scorers(self) -> dict[int, Scorer]:
        """A new scorer for each stage, by layer."""
        choices = {stage.layer: stage.scorer or self.scorer for stage in self.stages}
        return {layer: make_scorer(choice.name, choice.options) for layer, choice in choices.items()}

    def with_scorer(self, scorer: ScorerChoice) -> Self:
        """A copy in which ``scorer`` ranks the tokens of all stages."""
        stages = tuple(stage.model_copy(update={"scorer": None}) for stage in self.stages)
        return self.model_copy(update={"stages": stages, "scorer": scorer})

    def to_json(self) -> str:
        """The file's text: indented JSON with a final newline."""
        return self.model_dump_json(indent=2, exclude_none=True) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write version 2 atomically: a reader sees the old or the new file."""
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
    """Convert a version 1 document to version 2. Raises `ScheduleError`."""
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
    stages = upgraded.get("stages")
    if isinstance(stages, list) and any(isinstance(stage, dict) and "scorer" in stage for stage in stages):
        raise ScheduleError(f"{source}: field `stages.scorer` belongs to version 2, this file says version 1")
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
