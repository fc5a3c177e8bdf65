"""Facts with files of their own: the comparison of scorers, the quality of answers, held-out results."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, ValidationError

from schedule_finder.errors import InputError
from schedule_finder.evidence.solver import Facts, RuleResult
from schedule_finder.files import write_text


class _Document(Facts):
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
            raise InputError(f"{path}: {problem(error)}; {cls.remedy}") from error
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
    refused: dict[str, str] = Field(default_factory=dict)

    def ranked(self, place: str) -> list[RuleResult]:
        """Rules of the final round at a place, the best first; ties go to the one listed first."""
        final = [one for one in self.results if one.place == place and one.samples == self.samples]
        return sorted(final, key=lambda one: one.loss)


class AnswerExample(Facts):
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
    examples: list[AnswerExample] = Field(default_factory=list)

    def lines(self) -> list[str]:
        """The warning and its examples, one line each; none without a warning."""
        if self.warning is None:
            return []
        shown = [
            f"  {example.id}: answer {example.answer!r}, reference {example.reference!r}"
            for example in self.examples
        ]
        return [f"warning: {self.warning}", *shown]


class HeldOutResult(Facts):
    """One method on the held-out samples: shares in [0, 1], ``ci_*`` the 95 % interval, ``kl`` in nats.

    ``score`` is by ``metric``, ``exact_match`` and ``ci_*`` are by exact match whatever the metric. For a random
    baseline the values are means over ``draws`` draws, and ``draw_*`` is the range of the score over them (of
    agreement where no sample has a reference answer). ``hard_*`` are on the hard subset, which needs the baseline with
    down-sampled images.
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
    hard_n: int | None = None
    hard_score: float | None = None
    hard_low: float | None = None
    hard_high: float | None = None
    hard_retention: float | None = None


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
    others: list[HeldOutSummary] = Field(default_factory=list)

    def of(self, wanted: str) -> HeldOutSummary | None:
        """The part about the schedule with this digest; None where it was not evaluated."""
        return next((one for one in (self, *self.others) if one.schedule == wanted), None)


def problem(error: ValidationError) -> str:
    """The first problem, with the field that has it."""
    first = error.errors(include_url=False)[0]
    return f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}"
