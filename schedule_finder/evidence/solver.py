"""What a solver says of its choice: alternatives, comparisons of scorers, confidence."""

from __future__ import annotations

from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from pruning_runtime.schedule import DroppedTokens, Stage


class Facts(BaseModel):
    """Fields that no type names are kept as they are."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Alternative(Facts):
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


class RuleResult(Facts):
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


class PolicyResult(Facts):
    """A token policy on the chosen stages: answer change and KL, and how much more it changes than the chosen policy.

    ``worse_by``: 95 % paired bootstrap interval of the answer change (nats of KL in files without ``measured_change``).
    ``samples``: what it was measured on; a control that is clearly worse is not measured on all. None in older files.
    """

    measured_kl: float
    measured_change: float | None = None
    worse_by: tuple[float, float]
    samples: int | None = None


class PolicyChoice(Facts):
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


class Confidence(Facts):
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


class SolverEvidence(Facts):
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
        policies: policies that were measured on the chosen stages: those that could be chosen, and all controls.
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


class Serving(Facts):
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
