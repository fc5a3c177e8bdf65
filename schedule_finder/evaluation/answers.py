"""Every answer of an evaluation as a table, and whether the full model's answers are usable at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from schedule_finder.evaluation.methods import Method
from schedule_finder.evaluation.metrics import Outcome, same_answer
from schedule_finder.evidence import AnswerExample, AnswerQuality
from schedule_finder.files import replacing

LEAST_EXACT_MATCH = 0.1
"""Exact match of the full model below which the prompt or the scoring is likely to be wrong."""
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
            "correct": outcome.correct,
            "agrees": outcome.agrees,
            "kl": outcome.kl,
        }
        for method, found in outcomes.items()
        for outcome in found
    ]
    return pd.DataFrame(rows).astype({"draw": "Int64", "correct": "boolean", "reference": "string"})


def write_answers(path: Path, outcomes: Mapping[Method, Sequence[Outcome]]) -> None:
    """Write `answers_table` as Parquet in one step; the same answers give the same bytes."""
    with replacing(path) as partial:
        answers_table(outcomes).to_parquet(partial, index=False)


def answer_quality(
    ids: Sequence[str], answers: Sequence[str], references: Sequence[str | None]
) -> AnswerQuality:
    """Exact match and empty answers of the unpruned model, with a warning where they are suspicious.

    All arguments have one entry per sample; a reference of None is not judged. Examples are recorded with a warning
    only: empty answers first, then wrong ones.
    """
    judged = [
        same_answer(answer, reference)
        for answer, reference in zip(answers, references, strict=True)
        if reference is not None
    ]
    exact = sum(judged) / len(judged) if judged else None
    empty = sum(not answer.strip() for answer in answers)
    reasons = []
    if exact is not None and exact < LEAST_EXACT_MATCH:
        reasons.append(
            f"the full model answers {sum(judged)} of {len(judged)} samples correctly, less than "
            f"{100 * LEAST_EXACT_MATCH:.0f} %"
        )
    if empty:
        reasons.append(f"{empty} of {len(answers)} answers of the full model are empty")
    examples = [
        AnswerExample(id=name, answer=answer, reference=reference)
        for name, answer, reference in zip(ids, answers, references, strict=True)
        if not answer.strip() or (reference is not None and not same_answer(answer, reference))
    ]
    examples.sort(key=lambda example: bool(example.answer.strip()))
    advice = "check the prompt (chat template, question column) and the reference answers before using the schedule"
    return AnswerQuality(
        samples=len(answers),
        judged=len(judged),
        exact_match=exact,
        empty=empty,
        warning=f"{'; '.join(reasons)}: {advice}" if reasons else None,
        examples=examples[:NUM_EXAMPLES] if reasons else [],
    )


def quality_of(outcomes: Sequence[Outcome]) -> AnswerQuality:
    """`answer_quality` of the full model's outcomes."""
    return answer_quality(
        [outcome.id for outcome in outcomes],
        [outcome.answer for outcome in outcomes],
        [outcome.reference for outcome in outcomes],
    )
