"""What a request asks of the stage before the decoder: keep ratio and scorer. Does not import vLLM.

A server's setting is the entry ``adaptinfer`` of vLLM's ``hf_overrides``; a request changes it by the options
``keep_ratio`` and ``scorer`` among its ``mm_processor_kwargs``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pruning_runtime.errors import ScheduleError
from pruning_runtime.schedule import Schedule, ScorerChoice, Stage
from pruning_runtime.scorers import (
    SCORERS,
    AttentionScorer,
    FeatureScorer,
    FrameScorer,
    PositionScorer,
    Scorer,
    TowerScorer,
    make_scorer,
)

ENTRY = "adaptinfer"
"""Name of the server's setting in the model's configuration."""
REQUEST_OPTIONS = ("keep_ratio", "scorer")
"""Options of a request; vLLM's own processors do not get them."""
BEFORE_THE_DECODER = -1


class Setting(BaseModel):
    """How many tokens of each image or video are kept, and by which rule.

    Attributes:
        keep_ratio: fraction of the vision tokens of each image or video; at least one token is kept.
        scorer: the rule.
        image_newlines: as in a schedule.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep_ratio: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False, strict=True)] = 1.0
    scorer: ScorerChoice = ScorerChoice(name="strided")
    image_newlines: Literal["protected", "ranked"] = "protected"

    def kept(self, num_vision: int) -> int:
        """Tokens to keep of an image or video with ``num_vision`` tokens (half rounds up)."""
        return max(1, Stage(layer=BEFORE_THE_DECODER, keep_ratio=self.keep_ratio).kept(num_vision))

    def rule(self) -> Scorer:
        """The scorer as an object."""
        return make_scorer(self.scorer.name, self.scorer.options)

    def encode(self) -> bytes:
        """The setting as bytes, for cache keys and for the processes that run the model."""
        return self.model_dump_json().encode()

    @classmethod
    def of_schedule(cls, schedule: Schedule, source: str) -> Setting:
        """The setting that runs ``schedule``. Raises `ScheduleError` where vLLM cannot run it."""
        if (reason := why_not_served(schedule)) is not None:
            raise ScheduleError(
                f"{source}: vLLM cannot run this schedule: {reason}; {_find_another(schedule)}"
            )
        if not schedule.stages:
            return cls()
        (stage,) = schedule.stages
        return cls(
            keep_ratio=stage.keep_ratio,
            scorer=stage.scorer or schedule.scorer,
            image_newlines=schedule.image_newlines,
        )

    def changed_by(self, options: Mapping[str, Any]) -> Setting:
        """The setting of a request with these ``mm_processor_kwargs``. Raises `ScheduleError`."""
        own = {name: options[name] for name in REQUEST_OPTIONS if options.get(name) is not None}
        if not own:
            return self
        return _checked({**self.model_dump(), **own}, "mm_processor_kwargs")


def server_setting(entry: Mapping[str, Any]) -> Setting:
    """The setting of a server with this entry in ``hf_overrides``. Raises `ScheduleError`."""
    return _server_setting(json.dumps(entry, sort_keys=True))


@lru_cache(maxsize=64)
def decode_setting(encoded: bytes) -> Setting:
    """The inverse of `Setting.encode`."""
    return Setting.model_validate_json(encoded)


def server_schedule(entry: Mapping[str, Any]) -> Schedule | None:
    """The schedule that a server's entry names; None where it names none. Raises `ScheduleError`."""
    path = entry.get("schedule")
    return None if path is None else Schedule.load(path)


def why_not_served(schedule: Schedule) -> str | None:
    """Why vLLM cannot run ``schedule``; None where it can."""
    inside = [stage.layer for stage in schedule.stages if stage.layer != BEFORE_THE_DECODER]
    if inside:
        return (
            f"vLLM keeps equally many tokens in all decoder layers, and there is a stage at layer {inside[0]}"
        )
    if not schedule.stages:
        return None
    if schedule.dropped_tokens == "merge":
        return "vLLM's attention kernels have no token sizes, which `dropped_tokens: merge` needs"
    if schedule.positions != "original":
        return "it asks for `positions: renumbered`, and tokens keep their original positions in vLLM"
    (stage,) = schedule.stages
    choice = stage.scorer or schedule.scorer
    return why_scorer_not_served(make_scorer(choice.name, choice.options))


def why_scorer_not_served(scorer: Scorer) -> str | None:
    """Why vLLM cannot run a scorer before the decoder; None where it can."""
    name = f"scorer {scorer.name!r}"
    if isinstance(scorer, AttentionScorer):
        return f"{name} reads attention of the text, and vLLM encodes an image before it knows the text"
    if isinstance(scorer, PositionScorer):
        return f"{name} depends on the number of the prompt" if scorer.counts_prefills else None
    if isinstance(scorer, TowerScorer):
        return f"{name} reads attention of the vision tower, which vLLM's kernels do not return"
    if isinstance(scorer, FrameScorer):
        return f"{name} compares frames, and vLLM's request does not say how many tokens a frame has"
    return _why_features_not_served(scorer, name)


def _why_features_not_served(scorer: FeatureScorer, name: str) -> str | None:
    if scorer.needs_text:
        return f"{name} reads the text, and vLLM encodes an image before it knows the text"
    if scorer.needs_layer or scorer.needs_keys:
        return f"{name} reads a decoder layer, and the stage is before the decoder"
    if scorer.after_final_norm:
        return (
            f"{name} reads features behind the decoder's final norm, which the vision encoder does not have"
        )
    if scorer.joins is not None:
        return f"{name} changes kept tokens by dropped ones, which this plug-in does not do"
    return None


def servable_scorers() -> list[str]:
    """Names of the scorers that vLLM can run, as the registry lists them, with their default options."""
    return [name for name in SCORERS if why_scorer_not_served(make_scorer(name)) is None]


def without_request_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """``mm_processor_kwargs`` as vLLM's own processor may get them."""
    return {name: value for name, value in options.items() if name not in REQUEST_OPTIONS}


@lru_cache(maxsize=16)
def _server_setting(entry: str) -> Setting:
    given = json.loads(entry)
    if not isinstance(given, dict):
        raise ScheduleError(
            f'hf_overrides: {ENTRY!r} is {given!r}; write {{"schedule": FILE}}, or keep_ratio and scorer'
        )
    schedule = server_schedule(given)
    if schedule is None:
        return _checked(given, f"hf_overrides: {ENTRY}")
    base = Setting.of_schedule(schedule, str(given["schedule"]))
    own = {name: value for name, value in given.items() if name != "schedule"}
    return _checked({**base.model_dump(), **own}, f"hf_overrides: {ENTRY}") if own else base


def _checked(fields: Mapping[str, Any], source: str) -> Setting:
    """A setting from fields of which ``scorer`` may be a name. Raises `ScheduleError` that names ``source``."""
    scorer = fields.get("scorer")
    given = dict(fields, scorer={"name": scorer}) if isinstance(scorer, str) else dict(fields)
    try:
        setting = Setting.model_validate(given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        raise ScheduleError(f"{source}: field `{field}`: {message} (found {problem['input']!r})") from error
    if (reason := why_scorer_not_served(setting.rule())) is not None:
        raise ScheduleError(f"{source}: {reason}; choose {', '.join(servable_scorers())}")
    return setting


def _find_another(schedule: Schedule) -> str:
    """The command that finds a schedule for vLLM, with the budget of this one."""
    budget = 0.25 if schedule.budget is None else schedule.budget.target
    return f"find one with `adaptinfer-profile schedule RUN --budget {budget:.0%} --for vllm`"
