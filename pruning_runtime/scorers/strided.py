"""Baseline: evenly strided tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import PositionScorer

if TYPE_CHECKING:
    from torch import Tensor


class Strided(PositionScorer):
    """Every n-th of the tokens that reach the stage, in reading order; gaps differ by at most one."""

    name = "strided"

    def score_positions(self, vision: Tensor, position: Tensor, keep: Tensor, forward: int) -> Tensor:
        rank = vision.long().cumsum(1) - 1
        total = vision.sum(1, keepdim=True).clamp(min=1)
        steps = keep[:, None]
        # Token `rank` is chosen where `rank * keep / total` reaches the next integer.
        chosen = (rank + 1) * steps // total > rank * steps // total
        return (chosen & vision).float()
