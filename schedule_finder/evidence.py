"""Why a schedule is what it is, as types: what the search writes into the schedule file, and what displays read.

The runtime keeps a schedule's evidence as plain JSON, so that a deployed model needs nothing of this package.
Every field may be missing: presets carry a source only, and files of format version 1 lack what came later.
Facts that no type here names are kept as they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from pruning_runtime.schedule import Schedule, Stage
from schedule_finder.errors import InputError
from schedule_finder.files import write_text


class _Facts(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class TypicalPrompt(_Facts):
    """Mean numbers of tokens over the calibration samples."""

    vision_tokens: float
    other_tokens: float | None = None


class Asked(_Facts):
    """What the user asked the search for; ``auto`` leaves the choice to the solver."""

    solver: str
    scorer: str
    dropped_tokens: str


class DetectorChoice(_Facts):
    """The detector whose change points the solver had."""

    name: str


class Alternative(_Facts):
    """Stages that were considered, and what was predicted or measured for them."""

    stages: list[Stage] = []
    predicted_kl: float | None = None
    measured_kl: float | None = None
    retained: float | None = None


class PolicyResult(_Facts):
    """A token policy on the chosen stages: answer KL, and how much higher it is than the chosen policy's.

    ``worse_by``: 95 % paired bootstrap interval in nats.
    """

    measured_kl: float
    worse_by: tuple[float, float]


class Confidence(_Facts):
    """How far resampled calibration samples agree on the schedule.

    Attributes:
        resamples: number of bootstrap resamples that were solved.
        level: coverage of the band.
        ratio_low: lower edge of the keep ratio of each layer, ``[num_layers]``.
        ratio_high: upper edge, ``[num_layers]``.
        layers: layers of the stages, as "1,5" -> number of resamples that choose them.
        variation: stages for parts of the samples: either half, and all data sets but one.
    """

    resamples: int
    level: float
    ratio_low: list[float]
    ratio_high: list[float]
    layers: dict[str, int]
    variation: dict[str, list[Stage]] = Field(
        default_factory=dict, validation_alias=AliasChoices("variation", "parts")
    )


class SolverEvidence(_Facts):
    """What all solvers say in the same words; a solver with facts of its own extends this type.

    Attributes:
        solver: its name.
        source: the publication that its rule is from.
        objective: what it minimises or maximises, with the unit.
        placed_by: what decided the layers.
        retained: share of the text-to-vision attention that the stages keep in replay.
        predicted_kl: answer KL in nats that the sensitivity table predicts.
        measured_samples: number of samples of the sensitivity table.
        measured_kl: answer KL in nats of the whole schedule on other samples.
        chosen_on_samples: number of those.
        measured_schedules: how many schedules were measured on them.
        by_number_of_stages: the best of each number of stages.
        candidates: schedules that the measurements began with.
        policies: every policy that was measured on the chosen stages.
        confidence: how far resampled samples agree.
    """

    solver: str = "unknown"
    source: str | None = None
    objective: str | None = None
    placed_by: str | None = None
    retained: float | None = None
    predicted_kl: float | None = None
    measured_samples: int | None = None
    measured_kl: float | None = None
    chosen_on_samples: int | None = None
    measured_schedules: int | None = Field(
        default=None, validation_alias=AliasChoices("measured_schedules", "tried")
    )
    by_number_of_stages: dict[str, Alternative] = {}
    candidates: list[Alternative] = []
    policies: dict[str, PolicyResult] = Field(
        default_factory=dict, validation_alias=AliasChoices("policies", "rules")
    )
    confidence: Confidence | None = None


class HeldOutResult(_Facts):
    """One method on the held-out samples: shares in [0, 1], ``ci_*`` the 95 % interval, ``kl`` in nats."""

    n: int
    exact_match: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    agreement: float | None = None
    kl: float | None = None


class Evidence(_Facts):
    """Everything a schedule file says about its origin."""

    samples: int | None = None
    dataset: str | list[str] | None = None
    typical_prompt: TypicalPrompt | None = None
    question_types: list[str] = []
    detector: DetectorChoice | None = None
    change_points: list[int] = []
    asked: Asked | None = None
    solver: SerializeAsAny[SolverEvidence] | None = None
    held_out: dict[str, HeldOutResult] = {}
    """Of version 1 files; now in `HeldOutSummary`."""

    @classmethod
    def of(cls, schedule: Schedule, source: Path | str = "schedule") -> Self:
        """The evidence of a schedule. Raises `InputError` that names ``source`` where it does not fit the types."""
        try:
            return cls.model_validate(schedule.evidence)
        except ValidationError as error:
            raise InputError(
                f"{source}: evidence {_problem(error)}; this release does not read that (an older format, or damage); "
                "schedule again"
            ) from error


class HeldOutSummary(_Facts):
    """The evaluation of one schedule in short, ``5_evaluation.json``.

    ``schedule`` is the `digest` of the schedule that was evaluated, ``budget`` its target.
    """

    schedule: str
    budget: float
    samples: int
    methods: dict[str, HeldOutResult]

    def save(self, path: Path) -> None:
        """Write the file in one step."""
        write_text(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read what `save` wrote; None where there is no such file. Raises `InputError`."""
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise InputError(f"{path}: {_problem(error)}; evaluate again") from error


def digest(schedule: Schedule) -> str:
    """Identity of what a schedule does: the same for files that differ in budget, evidence or provenance only."""
    text = schedule.model_dump_json(exclude={"budget", "evidence", "provenance"})
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}"
