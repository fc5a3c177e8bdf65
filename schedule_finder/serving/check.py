"""What a schedule changes for a server: scores, prompt tokens, throughput, time to the first token; and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from schedule_finder.errors import InputError
from schedule_finder.evaluation.metrics import DEFAULT_METRIC, METRICS
from schedule_finder.intervals import mean_interval
from schedule_finder.samples import Sample
from schedule_finder.serving.client import ServedAnswer, replay

FULL = "full"
LEAST_GAIN = 0.05
"""Share by which throughput or the time to the first token must improve: less is within what repetitions differ by."""


@dataclass(frozen=True)
class Load:
    """One server at one number of requests at a time.

    Attributes:
        method: `FULL`, or the schedule's name.
        concurrency: requests at a time.
        answers: number of requests.
        score: mean score by the run's metric, in [0, 1]; None without reference answers.
        prompt_tokens: mean over the requests, as the server counts them.
        answers_per_second: of all requests together.
        first_token_ms: median time to the first token.
        first_token_p95_ms: its 95th percentile.
        scores: of each judged sample; not written.
    """

    method: str
    concurrency: int
    answers: int
    score: float | None
    prompt_tokens: float
    answers_per_second: float
    first_token_ms: float
    first_token_p95_ms: float
    scores: np.ndarray = field(repr=False, compare=False)

    def row(self) -> dict[str, Any]:
        """The numbers for tables and JSON."""
        facts = asdict(self)
        del facts["scores"]
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in facts.items()}


def measure_load(
    url: str,
    method: str,
    samples: Sequence[Sample],
    bodies: Sequence[bytes],
    levels: Sequence[int],
    metric: str | None,
    after_level: Callable[[Load], None] = lambda _load: None,
) -> list[Load]:
    """Every level on all samples, after as many requests as the highest level for warming up."""
    replay(url, bodies[: max(levels)], max(levels))
    found = []
    for level in levels:
        answers, seconds = replay(url, bodies, level)
        found.append(_load(method, level, samples, answers, seconds, metric))
        after_level(found[-1])
    return found


def check_that_it_pruned(full: Load, pruned: Load) -> None:
    """Raise `InputError` where the server with the schedule read as many tokens as the one without."""
    if pruned.prompt_tokens >= full.prompt_tokens:
        raise InputError(
            f"vLLM read {pruned.prompt_tokens:g} prompt tokens with the schedule and {full.prompt_tokens:g} without, so "
            "it did not prune; see the server's log for a line that begins with `adaptinfer:`"
        )


def verdicts(full: Sequence[Load], pruned: Sequence[Load]) -> list[str]:
    """What a schedule changes, in one line for scores and one for each level."""
    lines = []
    one, other = full[0], pruned[0]
    if one.score is not None and other.score is not None:
        low, high = mean_interval(other.scores - one.scores)
        loss = "the schedule costs score" if high < 0 else "no loss of score is shown"
        lines.append(
            f"{loss}: {100 * one.score:.1f} % without and {100 * other.score:.1f} % with it, difference "
            f"{100 * low:.1f} to {100 * high:.1f} points; {one.prompt_tokens:.0f} and {other.prompt_tokens:.0f} prompt "
            "tokens"
        )
    for plain, ours in zip(full, pruned, strict=True):
        speed = ours.answers_per_second / plain.answers_per_second
        wait = ours.first_token_ms / plain.first_token_ms
        lines.append(
            f"concurrency {plain.concurrency}: {_verdict(speed, wait)}; {speed:.2f} times the answers per second, "
            f"{wait:.2f} times the time to the first token"
        )
    return lines


def _verdict(speed: float, wait: float) -> str:
    better = speed >= 1 + LEAST_GAIN or wait <= 1 - LEAST_GAIN
    worse = speed <= 1 - LEAST_GAIN or wait >= 1 + LEAST_GAIN
    if better and not worse:
        return "serving is faster"
    if better:
        return "one of the two is better and the other worse"
    return "pruning does not pay, serving is " + ("slower" if worse else "not faster")


def _load(
    method: str,
    level: int,
    samples: Sequence[Sample],
    answers: Sequence[ServedAnswer],
    seconds: float,
    metric: str | None,
) -> Load:
    scores = [
        METRICS[metric or sample.metric or DEFAULT_METRIC].score(answer.text, sample.all_references)
        for sample, answer in zip(samples, answers, strict=True)
        if sample.all_references
    ]
    waits = 1000 * np.array([answer.first_token for answer in answers])
    return Load(
        method=method,
        concurrency=level,
        answers=len(answers),
        score=float(np.mean(scores)) if scores else None,
        prompt_tokens=float(np.mean([answer.prompt_tokens for answer in answers])),
        answers_per_second=len(answers) / seconds,
        first_token_ms=float(np.median(waits)),
        first_token_p95_ms=float(np.quantile(waits, 0.95)),
        scores=np.array(scores, dtype=float),
    )
