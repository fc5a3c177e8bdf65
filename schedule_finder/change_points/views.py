"""The same analysis on several views of a profile, and whether they agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from schedule_finder.change_points.attention_shift import AttentionShift
from schedule_finder.change_points.distances import curve_distances

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np

    from schedule_finder.change_points.base import ChangePoints

MAIN_VIEW = "uniform_text"


def detect_views(
    text_guided: Iterable[np.ndarray],
    vision_mass: np.ndarray,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, ChangePoints]:
    """Change points of the text-guided score and of the attention mass on vision tokens.

    Args:
        text_guided: the score of that name, one ``[num_layers, num_vision]`` per sample; read once.
        vision_mass: share of the text queries' attention on vision tokens, ``[num_samples, num_layers]``.
        layers: the backbone's number of each row.
        seed: draws what is random.

    For the mass, distances are squared differences: the change in mean is what counts, in units of the
    squared mass, and there are no isolated layers.
    """
    detector = AttentionShift()
    return {
        "text_guided": detector.detect(text_guided, layers=layers, seed=seed),
        "vision_mass": detector.detect_in(curve_distances(vision_mass), layers=layers, seed=seed),
    }


def compare_views(main: Sequence[int], views: dict[str, Sequence[int]]) -> str:
    """One sentence: which views have the same change points as the main one, to within a layer."""
    if not views:
        return ""

    def listed(points: Sequence[int]) -> str:
        return ", ".join(map(str, points)) or "none"

    different = {name: points for name, points in views.items() if not _same(main, points)}
    if not different:
        return f"{' and '.join(views)} have the same change points ({listed(main)})"
    parts = "; ".join(f"{name} has {listed(points)}" for name, points in different.items())
    return f"views disagree: {MAIN_VIEW} has {listed(main)}; {parts}"


def _same(first: Sequence[int], second: Sequence[int]) -> bool:
    pairs = zip(sorted(first), sorted(second), strict=False)
    return len(first) == len(second) and all(abs(a - b) <= 1 for a, b in pairs)
