"""Contains: a reference stands somewhere in the answer."""

from __future__ import annotations

from collections.abc import Sequence

from schedule_finder.evaluation.metrics.base import Metric


class Contains(Metric):
    """1 where any reference is part of the answer, letter for letter but for case and line breaks.

    A long answer can contain much by chance; compare methods at the same ``--max-new-tokens``.
    """

    name = "contains"
    label = "contains"
    source = "OCRBench (arXiv 2305.07895)"

    def score(self, answer: str, references: Sequence[str]) -> float:
        """1 or 0; an empty reference is in no answer."""
        found = _plain(answer)
        return float(any(expected in found for expected in map(_plain, references) if expected))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
