"""Relaxed accuracy: numbers may be off by 5 %."""

from __future__ import annotations

import math
from collections.abc import Sequence

from schedule_finder.evaluation.metrics.base import Metric

TOLERANCE = 0.05


class RelaxedAccuracy(Metric):
    """1 where a number is within 5 % of the reference, or where texts are equal but for case.

    As in the published evaluations of ChartQA: ``12%`` is the number 0.12, and a reference of 0 needs the same text,
    since 5 % of it is nothing.
    """

    name = "relaxed_accuracy"
    label = "relaxed accuracy"
    source = "PlotQA (arXiv 1909.00997), ChartQA (arXiv 2203.10244)"

    def score(self, answer: str, references: Sequence[str]) -> float:
        """1 or 0."""
        return float(any(_matches(answer, reference) for reference in references))


def _matches(answer: str, reference: str) -> bool:
    found, expected = _number(answer), _number(reference)
    if found is not None and expected:
        return abs(found - expected) <= TOLERANCE * abs(expected)
    return answer.strip().lower() == reference.strip().lower()


def _number(text: str) -> float | None:
    """The number that a text is; None for other texts, infinities and NaN."""
    text = text.strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
