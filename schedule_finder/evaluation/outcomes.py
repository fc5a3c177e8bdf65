"""What is reported of each method: the metric's score, agreement, answer KL and costs, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from schedule_finder.evaluation.hard_subset import HARD_COLUMNS, hard_items, on_hard_items
from schedule_finder.evaluation.methods import SMALLER_IMAGES, Method
from schedule_finder.evaluation.metrics import DEFAULT_METRIC, METRICS, Metric
from schedule_finder.intervals import paired_interval, score_interval, wilson_interval

DETAILS = ("precision", "recall", "f1", "yes_share")
"""What the metrics report besides their score."""
MIXED = "mixed"
"""The metric of a row whose samples have several."""
COLUMNS = (
    "method",
    "budget",
    "question_type",
    "n",
    "scored",
    "exact_match",
    "ci_low",
    "ci_high",
    "metric",
    "score",
    "score_low",
    "score_high",
    *DETAILS,
    "difference",
    "difference_low",
    "difference_high",
    "agreement",
    "kl",
    "processed",
    "published",
    "flops",
    "kv_bytes",
    "prefill_ms",
    "scorer",
    "dropped_tokens",
    "draws",
    "draw_low",
    "draw_high",
    *HARD_COLUMNS,
    "schedule",
    "digest",
)


@dataclass(frozen=True)
class Outcome:
    """One method on one sample.

    Attributes:
        id: of the sample.
        question_type: of the sample.
        answer: the generated text.
        correct: whether it is the same as a reference answer; None where there is none.
        agrees: whether it matches the full model's answer.
        kl: answer KL in nats.
        processed: vision tokens that the layers computed, as a share of the full model's.
        published: the same by the papers' count.
        flops: of the decoder's prefill, as a share of the full model's.
        kv_bytes: cache bytes after the prefill.
        prefill_ms: milliseconds of the decoder's prefill, the batch's divided by its rows.
        reference: the sample's own answer; None where there is none.
        references: all reference answers.
        metric: what ``score`` is by.
        score: of the answer, in [0, 1]; None where there is no reference answer.
    """

    id: str
    question_type: str
    answer: str
    correct: bool | None
    agrees: bool
    kl: float
    processed: float
    published: float
    flops: float
    kv_bytes: float
    prefill_ms: float
    reference: str | None = None
    references: tuple[str, ...] = ()
    metric: str = DEFAULT_METRIC
    score: float | None = None


def summarize(outcomes: Mapping[Method, Sequence[Outcome]]) -> pd.DataFrame:
    """One row per method and question type (``all`` first), with the columns `COLUMNS`.

    ``n`` counts the samples, ``scored`` those that have a reference answer; only these have a score.
    Draws of a random method share a row: values are means over the draws, intervals are those of the mean over
    samples, and ``draw_low`` and ``draw_high`` are the least and the highest score of a draw (agreement where no
    sample has a reference answer). The column ``metric`` is `MIXED` where the samples have several metrics;
    `DETAILS` are then missing. `HARD_COLUMNS` are of the hard subset of the schedule and its budget, and missing
    without the baseline that defines it, down-sampled images.
    """
    own = {(method.of, method.budget): found for method, found in outcomes.items() if method.is_schedule}
    hard = _hard_outcomes(outcomes)
    rows = []
    for draws in _by_method(outcomes):
        method, found = draws[0]
        prunes = bool(method.schedule.stages)
        facts = {
            "method": method.name,
            "budget": method.budget,
            "scorer": method.schedule.scorer.name if prunes else None,
            "dropped_tokens": method.schedule.dropped_tokens if prunes else None,
            "schedule": method.of[0],
            "digest": method.of[1],
        }
        kinds = sorted({outcome.question_type for outcome in found} - {"all"})
        for kind in ("all", *kinds):
            of_kind = [
                [outcome for outcome in drawn if kind in ("all", outcome.question_type)] for _, drawn in draws
            ]
            ours = own.get((method.of, method.budget), ())
            reference = [one for one in ours if kind in ("all", one.question_type)]
            row = facts | {"question_type": kind} | _summary(of_kind) | _difference(of_kind, reference)
            full = [
                one for one in hard.get((method.of, method.budget), ()) if kind in ("all", one.question_type)
            ]
            if (method.of, method.budget) in hard:
                row |= _on_hard(of_kind, full)
            rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"draws": float})


_Of = tuple[tuple[str, str], float]
"""A schedule and its budget."""


def _hard_outcomes(outcomes: Mapping[Method, Sequence[Outcome]]) -> dict[_Of, list[Outcome]]:
    """The full model's outcomes on the hard items, for each schedule and budget with down-sampled images."""
    full = next((found for method, found in outcomes.items() if not any(method.of)), ())
    known = np.array([one.score for one in full], float)
    return {
        (method.of, method.budget): [
            one
            for one, hard in zip(
                full, hard_items(known, np.array([o.score for o in found], float)), strict=True
            )
            if hard
        ]
        for method, found in outcomes.items()
        if full and method.name == SMALLER_IMAGES
    }


def _on_hard(draws: Sequence[Sequence[Outcome]], full: Sequence[Outcome]) -> dict[str, Any]:
    hard = {one.id for one in full}
    scores = [[one.score for one in drawn if one.id in hard] for drawn in draws]
    return on_hard_items(np.array(scores, float), np.array([one.score for one in full], float))


_Draw = tuple[Method, Sequence[Outcome]]


def _by_method(outcomes: Mapping[Method, Sequence[Outcome]]) -> list[list[_Draw]]:
    """Draws of one method and budget together, in the order of their first ones."""
    groups: dict[tuple[Any, ...], list[_Draw]] = {}
    for index, (method, found) in enumerate(outcomes.items()):
        key = (index,) if method.draw is None else (method.of, method.name, method.budget)
        groups.setdefault(key, []).append((method, found))
    return list(groups.values())


def _difference(draws: Sequence[Sequence[Outcome]], own: Sequence[Outcome]) -> dict[str, float]:
    """Score less that of the schedule for the same budget, with its paired interval; 0 of the schedule itself."""
    pairs = [
        sum(one.score or 0.0 for one in drawn) / len(drawn) - other.score
        for *drawn, other in zip(*draws, own, strict=False)
        if other.score is not None and all(one.score is not None for one in drawn)
    ]
    names = ("difference", "difference_low", "difference_high")
    if not pairs:
        return dict.fromkeys(names, math.nan)
    if len(draws) == 1 and all(one is other for one, other in zip(draws[0], own, strict=False)):
        return dict.fromkeys(names, 0.0)
    low, high = paired_interval(np.array(pairs))
    return dict(zip(names, (sum(pairs) / len(pairs), low, high), strict=True))


def _summary(draws: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    outcomes = [outcome for drawn in draws for outcome in drawn]
    judged = [[outcome.correct for outcome in drawn if outcome.correct is not None] for drawn in draws]
    correct, count = sum(map(sum, judged)) / len(draws), len(judged[0])
    low, high = wilson_interval(correct, count)
    scored = _scores(draws)
    if count:
        of_draw = [float(row.mean()) for row in scored]
    else:
        of_draw = [sum(outcome.agrees for outcome in drawn) / len(drawn) for drawn in draws]

    def mean(pick: Callable[[Outcome], float]) -> float:
        return sum(map(pick, outcomes)) / len(outcomes)

    return {
        "n": len(draws[0]),
        "scored": scored.shape[1] if scored.size else 0,
        "exact_match": correct / count if count else math.nan,
        "ci_low": low,
        "ci_high": high,
        **_metric_summary(draws, scored),
        "agreement": mean(lambda outcome: outcome.agrees),
        "kl": mean(lambda outcome: outcome.kl),
        "processed": mean(lambda outcome: outcome.processed),
        "published": mean(lambda outcome: outcome.published),
        "flops": mean(lambda outcome: outcome.flops),
        "kv_bytes": mean(lambda outcome: outcome.kv_bytes),
        "prefill_ms": mean(lambda outcome: outcome.prefill_ms),
        "draws": len(draws) if len(draws) > 1 else None,
        "draw_low": min(of_draw) if len(draws) > 1 else math.nan,
        "draw_high": max(of_draw) if len(draws) > 1 else math.nan,
    }


def _scores(draws: Sequence[Sequence[Outcome]]) -> np.ndarray:
    """Scores of the samples that have references, ``[draws, samples]``."""
    return np.array([[one.score for one in drawn if one.score is not None] for drawn in draws], float)


def _metric_summary(draws: Sequence[Sequence[Outcome]], scored: np.ndarray) -> dict[str, Any]:
    """The metric, its mean with a 95 % interval, and its details where all samples have the same metric."""
    names = {one.metric for drawn in draws for one in drawn}
    name = names.pop() if len(names) == 1 else MIXED
    found: dict[str, Any] = {"metric": name, "score": math.nan, "score_low": math.nan, "score_high": math.nan}
    if not scored.size:
        return found
    found["score"] = float(scored.mean())
    found["score_low"], found["score_high"] = score_interval(scored)
    return found | (_details(METRICS[name], draws) if name in METRICS else {})


def _details(metric: Metric, draws: Sequence[Sequence[Outcome]]) -> dict[str, float]:
    """The metric's `Metric.details`, each a mean over the draws."""
    of_draw = []
    for drawn in draws:
        judged = [one for one in drawn if one.references]
        of_draw.append(metric.details([one.answer for one in judged], [one.references for one in judged]))
    return {name: sum(each[name] for each in of_draw) / len(of_draw) for name in of_draw[0]}
