"""Step 3: change points of the text queries' attention on vision tokens.

Two detectors: `AttentionShift` (the default) and `TokenCurve`, the paper's recipe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schedule_finder.change_points.base import ALIASES, ChangePoints, Detector, canonical_name
from schedule_finder.change_points.placement import candidate_layers, without_isolated

if TYPE_CHECKING:
    from collections.abc import Callable

    from schedule_finder.change_points.attention_shift import AttentionShift
    from schedule_finder.change_points.token_curve import TokenCurve

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


def _attention_shift() -> Detector:
    from schedule_finder.change_points.attention_shift import AttentionShift

    return AttentionShift()


def _token_curve() -> Detector:
    from schedule_finder.change_points.token_curve import TokenCurve

    return TokenCurve()


DETECTORS: dict[str, Callable[[], Detector]] = {
    "attention_shift": _attention_shift,
    "token_curve": _token_curve,
}
"""Detectors by name. They import ruptures on first use: reading a change-point file does not need it."""
DEFAULT_DETECTOR = "attention_shift"


def get_detector(name: str) -> Detector:
    """Make the detector called ``name``; old names are accepted. Raises `ValueError`."""
    known = canonical_name(name)
    if known not in DETECTORS:
        raise ValueError(f"detector: {name!r}, need one of {', '.join(sorted(DETECTORS))}")
    return DETECTORS[known]()


def __getattr__(name: str) -> Any:
    if name == "AttentionShift":
        from schedule_finder.change_points.attention_shift import AttentionShift

        return AttentionShift
    if name == "TokenCurve":
        from schedule_finder.change_points.token_curve import TokenCurve

        return TokenCurve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
