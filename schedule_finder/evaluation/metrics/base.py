"""What a metric is: a score in [0, 1] of one answer, given all its reference answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar


class Metric(ABC):
    """Scores answers one at a time; a data set's score is the mean.

    Attributes:
        name: in the registry, on the command line and in tables.
        label: in headings and figures.
        source: benchmark and paper that define it.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def score(self, answer: str, references: Sequence[str]) -> float:
        """Score of one answer in [0, 1], higher is better.

        Args:
            answer: generated text.
            references: one or more reference answers.
        """

    def details(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """Further numbers of a whole data set, for example F1; most metrics have none."""
        return {}
