"""Every answer of an evaluation as a table, and whether the full model's answers are usable at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from schedule_finder.evaluation.methods import Method
from schedule_finder.evaluation.metrics import DEFAULT_METRIC, METRICS
from schedule_finder.evaluation.outcomes import MIXED, Outcome
from schedule_finder.evidence import AnswerExample, AnswerQuality
from schedule_finder.files import replacing
from schedule_finder.samples import Sample

LEAST_SCORE = 0.1
"""Score of the full model below which the prompt or the scoring is likely to be wrong."""
NUM_EXAMPLES = 3


def answers_table(outcomes: Mapping[Method, Sequence[Outcome]]) -> pd.DataFrame:
    """One row per method, draw and sample; ``draw`` is missing where nothing is random, ``kl`` is in nats."""
    rows = [
        {
            "id": outcome.id,
            "question_type": outcome.question_type,
            "method": method.name,
            "schedule": method.of[0],
            "budget": method.budget,
            "draw": method.draw,
            "answer": outcome.answer,
            "reference": outcome.reference,
            "references": list(outcome.references),
            "metric": outcome.metric,
            "score": outcome.score,
            "correct": outcome.correct,
            "agrees": outcome.agrees,
            "kl": outcome.kl,
        }
        for method, found in outcomes.items()
        for outcome in found
    ]
    return pd.DataFrame(rows).astype(
        {"draw": "Int64", "correct": "boolean", "reference": "string", "score": float}
    )


def write_answers(path: Path, outcomes: Mapping[Method, Sequence[Outcome]]) -> None:
    """Write `answers_table` as Parquet in one step; the same answers give the same bytes."""
    with replacing(path) as partial:
        answers_table(outcomes).to_parquet(partial, index=False)


def metric_of(sample: Sample, asked: str | None) -> str:
    """The metric that was asked for, else the one of the sample's data set, else exact match."""
    return asked or sample.metric or DEFAULT_METRIC


def answer_quality(
    ids: Sequence[str],
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str],
) -> AnswerQuality:
    """Score and empty answers of the unpruned model, with a warning where they are suspicious.

    All arguments have one entry per sample; a sample without references is not judged. Examples are recorded with a
    warning only: empty answers first, then wrong ones.
    """
    scores = [
        METRICS[metric].score(answer, known) if known else None
        for answer, known, metric in zip(answers, references, metrics, strict=True)
    ]
    judged = [score for score in scores if score is not None]
    used = sorted(set(metrics))
    metric = used[0] if len(used) == 1 else MIXED
    empty = sum(not answer.strip() for answer in answers)
    reasons = []
    if judged and sum(judged) / len(judged) < LEAST_SCORE:
        reasons.append(_low_score(sum(judged), len(judged), metric))
    if empty:
        reasons.append(f"{empty} of {len(answers)} answers of the full model are empty")
    examples = [
        AnswerExample(id=name, answer=answer, reference=known[0] if known else None)
        for name, answer, known, score in zip(ids, answers, references, scores, strict=True)
        if not answer.strip() or (score is not None and score < 0.5)
    ]
    examples.sort(key=lambda example: bool(example.answer.strip()))
    advice = "check the prompt (chat template, question column) and the reference answers before using the schedule"
    mean = sum(judged) / len(judged) if judged else None
    return AnswerQuality(
        samples=len(answers),
        judged=len(judged),
        exact_match=mean if metric == DEFAULT_METRIC else None,
        metric=metric,
        score=mean,
        empty=empty,
        warning=f"{'; '.join(reasons)}: {advice}" if reasons else None,
        examples=examples[:NUM_EXAMPLES] if reasons else [],
    )


def _low_score(total: float, count: int, metric: str) -> str:
    """The warning about a low score: counts where every score is 0 or 1 by exact match, else a percentage."""
    if metric == DEFAULT_METRIC:
        found = f"answers {total:.0f} of {count} samples correctly"
    else:
        found = f"scores {100 * total / count:.1f} % on {count} samples ({metric})"
    return f"the full model {found}, less than {100 * LEAST_SCORE:.0f} %"


def quality_of(outcomes: Sequence[Outcome]) -> AnswerQuality:
    """`answer_quality` of the full model's outcomes."""
    return answer_quality(
        [outcome.id for outcome in outcomes],
        [outcome.answer for outcome in outcomes],
        [outcome.references for outcome in outcomes],
        [outcome.metric for outcome in outcomes],
    )
