"""ROUGE-L: words in common with a reference text, in the same order, for captions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from schedule_finder.evaluation.metrics.base import Metric

BETA = 1.2
"""Weight of recall against precision."""


class RougeL(Metric):
    """F-measure of the longest common subsequence of words; precision and recall are the best over the references.

    As in the evaluation of COCO captions, with two differences. Words are runs of letters and digits in lower case,
    not tokens of the Penn Treebank. An answer without words scores 1 where a reference has none either.
    CIDEr, which papers report beside it, is no score of one answer: it weights words by all references of a data set.
    lmms-eval computes it for its caption tasks.
    """

    name = "rouge_l"
    label = "ROUGE-L"
    source = "ROUGE (Lin 2004), as in COCO captions (arXiv 1504.00325)"

    def score(self, answer: str, references: Sequence[str]) -> float:
        """A number in [0, 1]."""
        found, expected = words(answer), [words(reference) for reference in references]
        if not found:
            return float([] in expected)
        common = [(common_length(found, other), len(other)) for other in expected if other]
        precision = max((length / len(found) for length, _ in common), default=0.0)
        recall = max((length / total for length, total in common), default=0.0)
        if not precision:
            return 0.0
        return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    previous = [0] * (len(other) + 1)
    for word in one:
        current = [0]
        for column, compared in enumerate(other, start=1):
            longer = previous[column - 1] + 1 if word == compared else max(previous[column], current[-1])
            current.append(longer)
        previous = current
    return previous[-1]
