"""Step 3: change points of the text queries' attention on vision tokens.

Two detectors: `AttentionShift` (the default) and `TokenCurve`, the paper's recipe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from schedule_finder.change_points.attention_shift import AttentionShift
from schedule_finder.change_points.base import ALIASES, ChangePoints, Detector, canonical_name
from schedule_finder.change_points.placement import candidate_layers, without_isolated
from schedule_finder.change_points.token_curve import TokenCurve

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "ALIASES",
    "DEFAULT_DETECTOR",
    "DETECTORS",
    "AttentionShift",
    "ChangePoints",
    "Detector",
    "TokenCurve",
    "candidate_layers",
    "canonical_name",
    "get_detector",
    "without_isolated",
]

DETECTORS: dict[str, Callable[[], Detector]] = {
    "attention_shift": AttentionShift,
    "token_curve": TokenCurve,
}
DEFAULT_DETECTOR = "attention_shift"


def get_detector(name: str) -> Detector:
    """Make the detector called ``name``; old names are accepted. Raises `ValueError`."""
    known = canonical_name(name)
    if known not in DETECTORS:
        raise ValueError(f"detector: {name!r}, need one of {', '.join(sorted(DETECTORS))}")
    return DETECTORS[known]()
