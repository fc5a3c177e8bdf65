"""ANLS: average normalized Levenshtein similarity, for text that was read."""

from __future__ import annotations

from collections.abc import Sequence

from schedule_finder.evaluation.metrics.base import Metric

THRESHOLD = 0.5
"""Normalized distance from which an answer is wrong, not misread."""


class ANLS(Metric):
    """1 - edit distance / length of the longer text, best over the references; 0 from half the length on.

    Lower-cased, surplus space dropped. The edit distance is written here: `rapidfuzz` and `Levenshtein` have it, but
    would be a compiled dependency of all of `profile` for ten lines whose time is far below one forward pass's.
    """

    name = "anls"
    label = "ANLS"
    source = "ST-VQA (arXiv 1905.13648), DocVQA (arXiv 2007.00398)"

    def score(self, answer: str, references: Sequence[str]) -> float:
        """A number in [0, 1]."""
        return max(similarity(answer, reference) for reference in references)


def similarity(found: str, expected: str) -> float:
    """1 less the normalized edit distance, 0 where that is `THRESHOLD` or more."""
    found, expected = (" ".join(text.lower().split()) for text in (found, expected))
    longest = max(len(found), len(expected))
    distance = edit_distance(found, expected) / longest if longest else 0.0
    return 1.0 - distance if distance < THRESHOLD else 0.0


def edit_distance(one: str, other: str) -> int:
    """Levenshtein distance: fewest characters inserted, deleted or replaced."""
    previous = list(range(len(other) + 1))
    for row, character in enumerate(one, start=1):
        current = [row]
        for column, compared in enumerate(other, start=1):
            replaced = previous[column - 1] + (character != compared)
            current.append(min(replaced, previous[column] + 1, current[-1] + 1))
        previous = current
    return previous[-1]
