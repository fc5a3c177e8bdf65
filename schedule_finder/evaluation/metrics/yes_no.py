"""Yes or no, with precision, recall and F1 of "yes"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from schedule_finder.evaluation.metrics.base import Metric


class YesNo(Metric):
    """Accuracy of yes-or-no answers; "yes" is the positive class.

    As in POPE, an answer is "no" where its first sentence has the word no or not, and "yes" otherwise. So an empty or
    broken answer counts as "yes": look at ``yes_share`` too. MME's own score adds the share of images with both
    questions right; this does not.
    """

    name = "yes_no"
    label = "yes or no"
    source = "POPE (arXiv 2305.10355)"

    def score(self, answer: str, references: Sequence[str]) -> float:
        """1 or 0."""
        return float(says_yes(answer) == says_yes(references[0]))

    def details(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """``precision``, ``recall`` and ``f1`` of "yes" (0 where undefined), and ``yes_share`` of the answers."""
        found = [says_yes(answer) for answer in answers]
        expected = [says_yes(each[0]) for each in references]
        right = sum(one and other for one, other in zip(found, expected, strict=True))
        precision, recall = right / max(1, sum(found)), right / max(1, sum(expected))
        return {
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if right else 0.0,
            "yes_share": sum(found) / max(1, len(found)),
        }


def says_yes(text: str) -> bool:
    """Whether the first sentence lacks the words no and not."""
    words = re.findall(r"[^\s,]+", text.strip().partition(".")[0].lower())
    return "no" not in words and "not" not in words
