"""Multiple choice: the letter that an answer names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from schedule_finder.evaluation.metrics.base import Metric
from schedule_finder.evaluation.metrics.exact_match import same_answer

_PATTERNS = (
    re.compile(r"^\(?([A-Z])(?:[).:,]|$)"),  # the answer begins with it: B, (B), B. dog
    re.compile(r"^\(?([a-z])[).:](?:\s|$)"),
    re.compile(r"(?i:answer|option|choice)(?: is)?:? ?\(?([A-Z])\b"),
    re.compile(r"\(([A-Z])\)"),
    re.compile(r"\b([B-HJ-Z])\b"),  # A and I are words as well
)
"""Tried in this order; the first that finds exactly one letter decides."""


class MultipleChoice(Metric):
    """1 where the letter of the chosen option is the reference's.

    Rules only: no answer is guessed where a text names none or several letters. MMBench's official score asks a
    language model there, and asks each question in all rotations of its options; this does neither. A reference that
    is no letter (MMMU's open questions) is compared by `same_answer`.
    """

    name = "multiple_choice"
    label = "multiple choice"
    source = "ScienceQA (arXiv 2209.09513), MMBench (2307.06281), SEED-Bench (2307.16125), MMMU (2311.16502)"

    def score(self, answer: str, references: Sequence[str]) -> float:
        """1 or 0."""
        return float(any(_matches(answer, reference) for reference in references))


def option_letter(text: str) -> str | None:
    """The capital letter of the option that a text names; None where it names none, or several."""
    text = text.strip()
    if len(text) == 1 and text.isascii() and text.isalpha():
        return text.upper()
    for pattern in _PATTERNS:
        letters = {letter.upper() for letter in pattern.findall(text)}
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return None


def _matches(answer: str, reference: str) -> bool:
    expected = reference.strip().strip("().")
    if len(expected) == 1 and expected.isascii() and expected.isalpha():
        return option_letter(answer) == expected.upper()
    return same_answer(answer, reference)
