"""Where schedules put their stages, given change points."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


def candidate_layers(
    change_points: Sequence[int], num_layers: int, isolated: Collection[int] = ()
) -> list[int]:
    """Layers at which stages score, one per regime but the last: the regime's last layer that is not isolated.

    Args:
        change_points: first layers of new regimes.
        num_layers: decoder layers; a stage after the last one drops nothing, so the last regime has no candidate.
        isolated: isolated layers, which attend to other tokens than the layers around them.
    """
    bounds = [0, *sorted(set(change_points)), num_layers]
    if any(not 0 < point < num_layers for point in bounds[1:-1]):
        raise ValueError(f"change_points: {list(change_points)}, need layers from 1 to {num_layers - 1}")
    chosen = []
    for start, end in itertools.pairwise(bounds[:-1]):
        regular = [layer for layer in range(start, end) if layer not in isolated]
        chosen += regular[-1:]
    return chosen


def without_isolated(layers: Sequence[int], isolated: Collection[int]) -> list[int]:
    """``layers`` without isolated ones; all of them where nothing else is left."""
    return [layer for layer in layers if layer not in isolated] or list(layers)
