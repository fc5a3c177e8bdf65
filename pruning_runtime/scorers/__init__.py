"""Rules that score vision tokens at a stage: one rule per file; higher = keep.

A rule is either an `AttentionScorer`, a sum over heads of something computed from the text queries'
attention rows, or a `PositionScorer`, which looks at positions only and so works before the decoder.
"""

from __future__ import annotations

from typing import Any

from pruning_runtime.scorers.base import AttentionScorer, PositionScorer
from pruning_runtime.scorers.last_token import LastToken
from pruning_runtime.scorers.random_tokens import RandomTokens
from pruning_runtime.scorers.strided import Strided
from pruning_runtime.scorers.text_guided import TextGuided
from pruning_runtime.scorers.uniform_text import UniformText

Scorer = AttentionScorer | PositionScorer

SCORERS: dict[str, type[AttentionScorer] | type[PositionScorer]] = {
    scorer.name: scorer for scorer in (TextGuided, UniformText, LastToken, RandomTokens, Strided)
}

__all__ = ["SCORERS", "AttentionScorer", "PositionScorer", "Scorer", "make_scorer"]


def make_scorer(name: str, options: dict[str, Any] | None = None) -> Scorer:
    """Build the scorer called ``name``; ValueError names an unknown scorer or option."""
    try:
        scorer = SCORERS[name]
    except KeyError:
        raise ValueError(f"unknown scorer {name!r}; known: {', '.join(sorted(SCORERS))}") from None
    try:
        return scorer(**(options or {}))
    except TypeError as error:
        raise ValueError(f"scorer {name!r} does not take the options {options!r}: {error}") from error
