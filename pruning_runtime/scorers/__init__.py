"""Scorers: rules that give each vision token a score at a stage. One rule per file; higher scores are kept.

The base class of a rule says what it needs: `AttentionScorer` attention rows of the stage's layer, `FeatureScorer`
hidden states at the stage (`FrameScorer`: of whole frames), `TowerScorer` the vision tower, `PositionScorer`
positions only. To add a rule, add its file and its class to `SCORERS`.
"""

from __future__ import annotations

from importlib.metadata import entry_points
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
from pruning_runtime.scorers.evs import EVS
from pruning_runtime.scorers.fastervlm import FasterVLM
from pruning_runtime.scorers.frames import FrameScorer
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
from pruning_runtime.scorers.vidcom2 import VidCom2
from pruning_runtime.scorers.visionzip import VisionZip
from pruning_runtime.scorers.vscan import VScan

Scorer = AttentionScorer | FeatureScorer | PositionScorer

ENTRY_POINTS = "adaptinfer.scorers"
"""Group of entry points by which other packages register scorers; a schedule names them like ours."""

SCORERS: dict[str, type[Scorer]] = {
    scorer.name: scorer
    for scorer in (
        *(TextGuided, UniformText, LastToken, SparseVLM),
        *(DivPrune, CDPruner, MMTok, Dart, V2Drop),
        *(EVS, VidCom2),
        *(FasterVLM, HiPrune, VisionZip, SCOPE, VScan),
        *(RandomTokens, Strided),
    )
}

__all__ = [
    "SCORERS",
    "AttentionScorer",
    "FeatureScorer",
    "FrameScorer",
    "PositionScorer",
    "Scorer",
    "TowerScorer",
    "TowerTokens",
    "VisionTokens",
    "find_scorer",
    "make_scorer",
    "register_scorer",
]


def find_scorer(name: str) -> type[Scorer]:
    """The class of the scorer ``name``: ours, or one that an installed package registers as `ENTRY_POINTS`.

    Raises ValueError where there is none, or where the registered object is not a scorer.
    """
    if name in SCORERS:
        return SCORERS[name]
    others = entry_points(group=ENTRY_POINTS)
    if name not in others.names:
        known = ", ".join(sorted({*SCORERS, *others.names}))
        raise ValueError(f"unknown scorer {name!r}; known: {known}")
    found = others[name].load()
    if not (isinstance(found, type) and issubclass(found, Scorer)) or found.name != name:
        raise ValueError(
            f"scorer {name!r} of the entry point {others[name].value!r} is not a subclass of a scorer class with this "
            "name; correct the package that registers it"
        )
    return found


def register_scorer(scorer: type[Scorer]) -> type[Scorer]:
    """Make a scorer class known in this process; usable as a decorator.

    Schedules, searches and evaluations of this process can then name it. To make it known to every process, register
    it in a package as an entry point of the group `ENTRY_POINTS`.

    Raises:
        ValueError: it is not a scorer class with a name, or the name is taken by another class.
    """
    name = getattr(scorer, "name", None)
    if not (isinstance(scorer, type) and issubclass(scorer, Scorer)) or not isinstance(name, str):
        raise ValueError(f"{scorer!r} is not a subclass of a scorer class with a `name`")
    known = SCORERS.get(name)
    if known is not None and known.__qualname__ != scorer.__qualname__:
        raise ValueError(f"scorer {name!r} is known already as {known.__qualname__}; choose another name")
    SCORERS[name] = scorer
    return scorer


def make_scorer(name: str, options: dict[str, Any] | None = None) -> Scorer:
    """Build the scorer ``name``. Raises ValueError for an unknown scorer or option."""
    scorer = find_scorer(name)
    try:
        return scorer(**(options or {}))
    except TypeError as error:
        raise ValueError(f"scorer {name!r} does not take the options {options!r}: {error}") from error
