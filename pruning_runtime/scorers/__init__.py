"""Scorers: rules that give each vision token a score at a stage. One rule per file; higher scores are kept.

The base class of a rule says what it needs: `AttentionScorer` attention rows of the stage's layer, `FeatureScorer`
hidden states at the stage, `TowerScorer` the vision tower, `PositionScorer` positions only. To add a rule, add its file
and its class to `SCORERS`.
"""

from __future__ import annotations

from typing import Any

from pruning_runtime.scorers.base import (
    AttentionScorer,
    FeatureScorer,
    PositionScorer,
    TowerScorer,
    TowerTokens,
    VisionTokens,
)
from pruning_runtime.scorers.cdpruner import CDPruner
from pruning_runtime.scorers.dart import Dart
from pruning_runtime.scorers.divprune import DivPrune
from pruning_runtime.scorers.fastervlm import FasterVLM
from pruning_runtime.scorers.hiprune import HiPrune
from pruning_runtime.scorers.last_token import LastToken
from pruning_runtime.scorers.mmtok import MMTok
from pruning_runtime.scorers.random_tokens import RandomTokens
from pruning_runtime.scorers.scope import SCOPE
from pruning_runtime.scorers.sparsevlm import SparseVLM
from pruning_runtime.scorers.strided import Strided
from pruning_runtime.scorers.text_guided import TextGuided
from pruning_runtime.scorers.uniform_text import UniformText
from pruning_runtime.scorers.v2drop import V2Drop
from pruning_runtime.scorers.visionzip import VisionZip
from pruning_runtime.scorers.vscan import VScan

Scorer = AttentionScorer | FeatureScorer | PositionScorer

SCORERS: dict[str, type[AttentionScorer] | type[FeatureScorer] | type[PositionScorer]] = {
    scorer.name: scorer
    for scorer in (
        *(TextGuided, UniformText, LastToken, SparseVLM),
        *(DivPrune, CDPruner, MMTok, Dart, V2Drop),
        *(FasterVLM, HiPrune, VisionZip, SCOPE, VScan),
        *(RandomTokens, Strided),
    )
}

__all__ = [
    "SCORERS",
    "AttentionScorer",
    "FeatureScorer",
    "PositionScorer",
    "Scorer",
    "TowerScorer",
    "TowerTokens",
    "VisionTokens",
    "make_scorer",
]


def make_scorer(name: str, options: dict[str, Any] | None = None) -> Scorer:
    """Build the scorer ``name``. Raises ValueError for an unknown scorer or option."""
    try:
        scorer = SCORERS[name]
    except KeyError:
        raise ValueError(f"unknown scorer {name!r}; known: {', '.join(sorted(SCORERS))}") from None
    try:
        return scorer(**(options or {}))
    except TypeError as error:
        raise ValueError(f"scorer {name!r} does not take the options {options!r}: {error}") from error
