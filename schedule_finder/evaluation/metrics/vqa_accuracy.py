"""VQA accuracy: agreement with ten people, of whom three are enough."""

from __future__ import annotations

import re
from collections.abc import Sequence

from schedule_finder.evaluation.metrics.base import Metric

ENOUGH = 3
"""Equal references that give the full score."""
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_CONTRACTED = (
    "ain't aren't can't couldn't couldn't've didn't doesn't don't hadn't hasn't haven't he'd he's how'd how's i'd i'm "
    "i've isn't it'd it'll let's ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't "
    "should've shouldn't somebody'd somebody'll somebody's someone's something's that's there'd there're there's "
    "they'd they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd where's who'd "
    "who'll who's who've why's won't would've wouldn't y'all you'd you'll you're you've"
)
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}


class VQAAccuracy(Metric):
    """min(1, equal references / 3), averaged over all ways to leave one reference out.

    Leaving one out makes people and models comparable. Both sides are normalized first; the official code skips that
    where all references are the same. The contractions here are the common ones, not the official list. Fewer than
    four references are not this benchmark's data: then any equal reference gives 1.
    """

    name = "vqa_accuracy"
    label = "VQA accuracy"
    source = "VQA (arXiv 1505.00468) and VQA v2 (arXiv 1612.00837); TextVQA and VizWiz use it"

    def score(self, answer: str, references: Sequence[str]) -> float:
        """A number in [0, 1]."""
        found = normalized(answer)
        equal = sum(normalized(reference) == found for reference in references)
        if len(references) <= ENOUGH:
            return float(equal > 0)
        # Leaving out one of the equal ones lowers the count by one; there are `equal` such ways.
        lower, same = min(1.0, (equal - 1) / ENOUGH), min(1.0, equal / ENOUGH)
        return (equal * lower + (len(references) - equal) * same) / len(references)


def normalized(text: str) -> str:
    """An answer as VQA v2 compares it: punctuation, number words, articles and contractions are made alike."""
    text = given = " ".join(text.split())
    thousands = re.search(r"\d,\d", given) is not None
    for mark in _PUNCTUATION:
        # A mark that stands at a space, or with a thousands separator anywhere, leaves; others separate words.
        beside_space = f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if beside_space or thousands else " ")
    text = re.sub(r"\.(?!\d)", "", text).lower()
    words = (_DIGITS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
