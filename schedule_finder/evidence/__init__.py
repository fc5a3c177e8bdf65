"""Why a schedule is what it is, as types: what the search writes into the schedule file, and what displays read.

The runtime keeps a schedule's evidence as plain JSON, so that a deployed model needs nothing of this package.
Every field may be missing: presets carry a source only, and files of format version 1 lack what came later.
Facts that no type here names are kept as they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Self

from pydantic import Field, SerializeAsAny, ValidationError

from pruning_runtime.schedule import Schedule
from schedule_finder.errors import InputError
from schedule_finder.evidence.documents import (
    AnswerExample,
    AnswerQuality,
    HeldOutResult,
    HeldOutSummary,
    RuleProbe,
    problem,
)
from schedule_finder.evidence.solver import (
    Alternative,
    Confidence,
    Facts,
    PolicyChoice,
    PolicyResult,
    RuleResult,
    Serving,
    SolverEvidence,
)

__all__ = [
    "Alternative", "AnswerExample", "AnswerQuality", "Asked", "Confidence", "DetectorChoice", "Evidence", "HeldOutResult",
    "HeldOutSummary", "PolicyChoice", "PolicyResult", "RuleProbe", "RuleResult", "SampleCounts", "Serving",
    "SolverEvidence", "TypicalPrompt", "digest",
]  # fmt: skip


class TypicalPrompt(Facts):
    """Mean numbers of tokens over the calibration samples."""

    vision_tokens: float
    other_tokens: float | None = None


class SampleCounts(Facts):
    """Samples that were asked for and used; ``asked`` is None where the number was ``auto``."""

    asked: int | None
    profiled: int
    asked_held_out: int
    held_out: int


class Asked(Facts):
    """What the user asked the search for; ``auto`` leaves the choice to the solver."""

    solver: str
    scorer: str
    dropped_tokens: str


class DetectorChoice(Facts):
    """The detector whose change points the solver had."""

    name: str


class Evidence(Facts):
    """Everything a schedule file says about its origin."""

    samples: int | None = None
    dataset: str | list[str] | None = None
    typical_prompt: TypicalPrompt | None = None
    question_types: list[str] = Field(default_factory=list)
    detector: DetectorChoice | None = None
    change_points: list[int] = Field(default_factory=list)
    asked: Asked | None = None
    counts: SampleCounts | None = None
    solver: SerializeAsAny[SolverEvidence] | None = None
    serving: Serving | None = None
    """Of schedules that were searched for a serving engine."""
    full_model: AnswerQuality | None = None
    """A few answers of the unpruned model before the search; `run` asks for them."""
    held_out: dict[str, HeldOutResult] = Field(default_factory=dict)
    """Of version 1 files; now in `HeldOutSummary`."""

    @classmethod
    def of(cls, schedule: Schedule, source: Path | str = "schedule") -> Self:
        """The evidence of a schedule. Raises `InputError` that names ``source`` where it does not fit the types."""
        try:
            return cls.model_validate(schedule.evidence)
        except ValidationError as error:
            raise InputError(
                f"{source}: evidence {problem(error)}; this release does not read that (an older format, or damage); "
                "schedule again"
            ) from error


def digest(schedule: Schedule) -> str:
    """Identity of what a schedule does: the same for files that differ in budget, evidence or provenance only."""
    text = schedule.model_dump_json(exclude={"budget", "evidence", "provenance"})
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]
