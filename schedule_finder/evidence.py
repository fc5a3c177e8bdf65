"""Why a schedule is what it is, as types: what the search writes into the schedule file, and what displays read.

The runtime keeps a schedule's evidence as plain JSON, so that a deployed model needs nothing of this package.
Every field may be missing: presets carry a source only, and files of format version 1 lack what came later.
Facts that no type here names are kept as they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from pruning_runtime.schedule import DroppedTokens, Schedule, Stage
from schedule_finder.errors import InputError
from schedule_finder.files import write_text


class _Facts(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class TypicalPrompt(_Facts):
    """Mean numbers of tokens over the calibration samples."""

    vision_tokens: float
    other_tokens: float | None = None


class SampleCounts(_Facts):
    """Samples that were asked for and used; ``asked`` is None where the number was ``auto``."""

    asked: int | None
    profiled: int
    asked_held_out: int
    held_out: int


class Asked(_Facts):
    """What the user asked the search for; ``auto`` leaves the choice to the solver."""

    solver: str
    scorer: str
    dropped_tokens: str


class DetectorChoice(_Facts):
    """The detector whose change points the solver had."""

    name: str


class Alternative(_Facts):
    """Stages that were considered, under which policy, and what was predicted or measured for them.

    ``predicted_change``, ``measured_change``: answer change, in [0, 1]. ``predicted_kl``: of solvers that add KL.
    ``worse_by``: 95 % paired bootstrap interval of the answer change less that of the schedule (nats of answer KL in
    files without ``measured_change``); None where it was measured on fewer samples.
    """

    stages: list[Stage] = []
    policy: str | None = None
    samples: int | None = None
    worse_by: tuple[float, float] | None = None
    predicted_change: float | None = None
    predicted_kl: float | None = None
    measured_change: float | None = None
    measured_kl: float | None = None
    retained: float | None = None


class RuleResult(_Facts):
    """A scorer over a few single stages, ``place`` "pre_decoder" or "decoder": mean answer change and KL (nats).

    Earlier releases have no ``change``.
    """

    place: str
    scorer: str
    dropped_tokens: DroppedTokens = "discard"
    kl: float
    change: float | None = None
    samples: int

    @property
    def loss(self) -> float:
        """What rules are compared by: the answer change, or the KL of an earlier release."""
        return self.kl if self.change is None else self.change


class PolicyResult(_Facts):
    """A token policy on the chosen stages: answer change and KL, and how much more it changes than the chosen policy.

    ``worse_by``: 95 % paired bootstrap interval of the answer change (nats of KL in files without ``measured_change``).
    """

    measured_kl: float
    measured_change: float | None = None
    worse_by: tuple[float, float]


class PolicyChoice(_Facts):
    """Why a token policy (scorer, and what happens to dropped tokens) was chosen among those that were measured.

    Attributes:
        preferred: the policy of the sensitivity table, which is kept unless another one is better.
        best: the policy with the least measured answer change.
        chosen: the policy of the schedule.
        rule: ``preferred is best``; ``preferred within tolerance`` of the best; ``significantly better``: the 95 %
            interval of the preferred policy's excess over the chosen one excludes zero; ``beyond tolerance``: better
            by more than the tolerance, with an interval that includes zero; ``control is not worse``: evenly strided
            or random tokens, which read nothing, change no more answers than the policy that would be chosen.
        difference: answer change of the preferred policy less that of ``compared``.
        interval: its 95 % paired bootstrap interval.
        tolerance: the difference up to which the preferred policy is kept: one standard error of the difference, or
            1e-3 where that is more.
        compared: the policy that the preferred one was compared with: the chosen one, or the best where the
            preferred one was kept.
        samples: number of samples of the comparison.
        measure: what ``difference``, ``interval`` and ``tolerance`` are in; earlier releases compared answer KL in nats.
    """

    preferred: str
    best: str
    chosen: str
    rule: Literal[
        "preferred is best",
        "preferred within tolerance",
        "significantly better",
        "beyond tolerance",
        "control is not worse",
    ]
    compared: str
    difference: float
    interval: tuple[float, float]
    tolerance: float
    samples: int
    measure: Literal["answer change", "answer KL"] = "answer KL"


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
        answer_tokens: longest answer that answer KL was measured on, in tokens; None in older files: the first token.
        objective: what it minimises or maximises, with the unit.
        placed_by: what decided the layers.
        retained: share of the text-to-vision attention that the stages keep in replay.
        predicted_change: answer change, in [0, 1], that the sensitivity table predicts.
        predicted_kl: answer KL in nats that a solver which adds it predicts.
        measured_samples: number of samples of the sensitivity table.
        measured_change: answer change of the whole schedule on other samples.
        measured_kl: its answer KL in nats on them.
        chosen_on_samples: number of those.
        measured_schedules: how many schedules were measured on them.
        by_number_of_stages: the best of each number of stages.
        candidates: schedules that the measurements began with.
        compared_rules: scorers that were compared on single stages before the search.
        refused_rules: scorers that this backbone or its prompts do not allow, with the reason.
        policies: every policy that was measured on the chosen stages.
        policy_choice: why the schedule's policy was chosen among them; None where only one was measured.
        confidence: how far resampled samples agree.
    """

    solver: str = "unknown"
    source: str | None = None
    answer_tokens: int | None = None
    objective: str | None = None
    placed_by: str | None = None
    retained: float | None = None
    predicted_change: float | None = None
    predicted_kl: float | None = None
    measured_samples: int | None = None
    measured_change: float | None = None
    measured_kl: float | None = None
    chosen_on_samples: int | None = None
    measured_schedules: int | None = Field(
        default=None, validation_alias=AliasChoices("measured_schedules", "tried")
    )
    by_number_of_stages: dict[str, Alternative] = {}
    candidates: list[Alternative] = []
    compared_rules: list[RuleResult] = []
    refused_rules: dict[str, str] = {}
    policies: dict[str, PolicyResult] = Field(
        default_factory=dict, validation_alias=AliasChoices("policies", "rules")
    )
    policy_choice: PolicyChoice | None = None
    confidence: Confidence | None = None


class Serving(_Facts):
    """A schedule for a serving engine beside the best one of the same budget that the engine cannot run.

    Attributes:
        engine: its name.
        measured_change: answer change, in [0, 1].
        unrestricted_change: that of the search without the restriction, on the same samples.
        worse_by: 95 % paired bootstrap interval of the difference.
        samples: number of samples.
        unrestricted_stages: stages of the search without the restriction, under ``unrestricted_policy``.
    """

    engine: str
    measured_change: float
    unrestricted_change: float
    worse_by: tuple[float, float]
    samples: int
    unrestricted_stages: list[Stage] = []
    unrestricted_policy: str | None = None


class _Document(_Facts):
    """Facts with a file of their own; ``remedy`` ends the error about a damaged one."""

    remedy: ClassVar[str] = "evaluate again"

    def save(self, path: Path) -> None:
        """Write the file in one step."""
        write_text(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read what `save` wrote; None where there is no such file. Raises `InputError`."""
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise InputError(f"{path}: {_problem(error)}; {cls.remedy}") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); {cls.remedy}") from error


class RuleProbe(_Document):
    """Scorers compared on single stages, ``4_rules.json``; see `schedule_finder.measuring.rule_probe`.

    Attributes:
        samples: number of samples of the final round.
        results: every rule, the last round that it took part in.
        refused: policy -> why it cannot be used.
    """

    remedy: ClassVar[str] = "delete this file and schedule again"

    samples: int
    results: list[RuleResult]
    refused: dict[str, str] = {}

    def ranked(self, place: str) -> list[RuleResult]:
        """Rules of the final round at a place, the best first; ties go to the one listed first."""
        final = [one for one in self.results if one.place == place and one.samples == self.samples]
        return sorted(final, key=lambda one: one.loss)


class AnswerExample(_Facts):
    """An answer of the full model beside the reference answer, None where the data set has none."""

    id: str
    answer: str
    reference: str | None = None


class AnswerQuality(_Document):
    """Whether the unpruned model's answers are usable.

    Attributes:
        samples: number of answers.
        judged: number of those with a reference answer.
        exact_match: share of the judged answers that match, in [0, 1]; None where another metric judged them.
        metric: what judged them; ``mixed`` where several did.
        score: mean of their scores, in [0, 1].
        empty: number of empty answers.
        warning: what is suspicious, None where nothing is.
        examples: up to three suspicious answers; empty without a warning.
    """

    remedy: ClassVar[str] = "delete this file and run again"

    samples: int
    judged: int = 0
    exact_match: float | None = None
    metric: str | None = None
    score: float | None = None
    empty: int = 0
    warning: str | None = None
    examples: list[AnswerExample] = []

    def lines(self) -> list[str]:
        """The warning and its examples, one line each; none without a warning."""
        if self.warning is None:
            return []
        shown = [
            f"  {example.id}: answer {example.answer!r}, reference {example.reference!r}"
            for example in self.examples
        ]
        return [f"warning: {self.warning}", *shown]


class HeldOutResult(_Facts):
    """One method on the held-out samples: shares in [0, 1], ``ci_*`` the 95 % interval, ``kl`` in nats.

    ``score`` is by ``metric``, ``exact_match`` and ``ci_*`` are by exact match whatever the metric. For a random
    baseline the values are means over ``draws`` draws, and ``draw_*`` is the range of the score over them (of
    agreement where no sample has a reference answer).
    """

    n: int
    exact_match: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    metric: str | None = None
    score: float | None = None
    score_low: float | None = None
    score_high: float | None = None
    f1: float | None = None
    agreement: float | None = None
    kl: float | None = None
    draws: int | None = None
    draw_low: float | None = None
    draw_high: float | None = None


class Evidence(_Facts):
    """Everything a schedule file says about its origin."""

    samples: int | None = None
    dataset: str | list[str] | None = None
    typical_prompt: TypicalPrompt | None = None
    question_types: list[str] = []
    detector: DetectorChoice | None = None
    change_points: list[int] = []
    asked: Asked | None = None
    counts: SampleCounts | None = None
    solver: SerializeAsAny[SolverEvidence] | None = None
    serving: Serving | None = None
    """Of schedules that were searched for a serving engine."""
    full_model: AnswerQuality | None = None
    """A few answers of the unpruned model before the search; `run` asks for them."""
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


class HeldOutSummary(_Document):
    """The evaluation of one schedule in short, ``5_evaluation.json``.

    ``schedule`` is the `digest` of the schedule that was evaluated, ``name`` its name, ``budget`` its target,
    ``full_model`` says whether the unpruned model's answers are usable. ``others``: schedules that were evaluated
    beside it on the same samples.
    """

    schedule: str
    name: str | None = None
    budget: float
    samples: int
    methods: dict[str, HeldOutResult]
    full_model: AnswerQuality | None = None
    others: list[HeldOutSummary] = []

    def of(self, wanted: str) -> HeldOutSummary | None:
        """The part about the schedule with this digest; None where it was not evaluated."""
        return next((one for one in (self, *self.others) if one.schedule == wanted), None)


def digest(schedule: Schedule) -> str:
    """Identity of what a schedule does: the same for files that differ in budget, evidence or provenance only."""
    text = schedule.model_dump_json(exclude={"budget", "evidence", "provenance"})
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}"
