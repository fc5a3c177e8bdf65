"""What is reported of each method: exact match, agreement, answer KL and costs, with intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from schedule_finder.evaluation.methods import Method
from schedule_finder.intervals import mean_interval, wilson_interval

COLUMNS = (
    "method",
    "budget",
    "question_type",
    "n",
    "exact_match",
    "ci_low",
    "ci_high",
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
)


@dataclass(frozen=True)
class Outcome:
    """One method on one sample.

    Attributes:
        id: of the sample.
        question_type: of the sample.
        answer: the generated text.
        correct: whether it matches the reference answer; None where there is none.
        agrees: whether it matches the full model's answer.
        kl: answer KL in nats.
        processed: vision tokens that the layers computed, as a share of the full model's.
        published: the same by the papers' count.
        flops: of the decoder's prefill, as a share of the full model's.
        kv_bytes: cache bytes after the prefill.
        prefill_ms: milliseconds of the decoder's prefill, the batch's divided by its rows.
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


def summarize(outcomes: Mapping[Method, Sequence[Outcome]]) -> pd.DataFrame:
    """One row per method and question type (``all`` first), with the columns `COLUMNS`."""
    own = {method.budget: found for method, found in outcomes.items() if method.name == "schedule"}
    rows = []
    for method, found in outcomes.items():
        prunes = bool(method.schedule.stages)
        facts = {
            "method": method.name,
            "budget": method.budget,
            "scorer": method.schedule.scorer.name if prunes else None,
            "dropped_tokens": method.schedule.dropped_tokens if prunes else None,
        }
        kinds = sorted({outcome.question_type for outcome in found} - {"all"})
        rows += [
            facts
            | {"question_type": kind}
            | _summary([outcome for outcome in found if kind in ("all", outcome.question_type)])
            | _difference(found, own.get(method.budget, ()), kind)
            for kind in ("all", *kinds)
        ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _difference(found: Sequence[Outcome], own: Sequence[Outcome], kind: str) -> dict[str, float]:
    """Exact match less that of the schedule for the same budget, with a paired bootstrap interval."""
    pairs = [
        float(one.correct) - float(other.correct)
        for one, other in zip(found, own, strict=False)
        if one.correct is not None and other.correct is not None and kind in ("all", one.question_type)
    ]
    names = ("difference", "difference_low", "difference_high")
    if not pairs:
        return dict.fromkeys(names, math.nan)
    low, high = mean_interval(np.array(pairs))
    return dict(zip(names, (sum(pairs) / len(pairs), low, high), strict=True))


def _summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    judged = [outcome.correct for outcome in outcomes if outcome.correct is not None]
    low, high = wilson_interval(sum(judged), len(judged))

    def mean(pick: Callable[[Outcome], float]) -> float:
        return sum(map(pick, outcomes)) / len(outcomes)

    return {
        "n": len(outcomes),
        "exact_match": sum(judged) / len(judged) if judged else math.nan,
        "ci_low": low,
        "ci_high": high,
        "agreement": mean(lambda outcome: outcome.agrees),
        "kl": mean(lambda outcome: outcome.kl),
        "processed": mean(lambda outcome: outcome.processed),
        "published": mean(lambda outcome: outcome.published),
        "flops": mean(lambda outcome: outcome.flops),
        "kv_bytes": mean(lambda outcome: outcome.kv_bytes),
        "prefill_ms": mean(lambda outcome: outcome.prefill_ms),
    }


def same_answer(found: str, expected: str) -> bool:
    """Exact match after lower-casing and dropping articles, punctuation and surplus space."""
    return _normalized(found) == _normalized(expected)


def _normalized(text: str) -> str:
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))
