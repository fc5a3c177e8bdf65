"""Exact match after a light normalization."""

from __future__ import annotations

import re
from collections.abc import Sequence

from schedule_finder.evaluation.metrics.base import Metric


class ExactMatch(Metric):
    """1 where the answer is the same as any reference by `same_answer`.

    The official scorer of GQA compares the texts as they are; most ports lower-case and drop the full stop first, and
    so does this.
    """

    name = "exact_match"
    label = "exact match"
    source = "GQA (arXiv 1902.09506), with the normalization of `same_answer`"

    def score(self, answer: str, references: Sequence[str]) -> float:
        """1 or 0."""
        return float(any(same_answer(answer, reference) for reference in references))


def same_answer(found: str, expected: str) -> bool:
    """Exact match after lower-casing and dropping articles, punctuation and surplus space."""
    return _normalized(found) == _normalized(expected)


def _normalized(text: str) -> str:
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))
