"""HiPrune's rule: salient objects of a middle block, what surrounds them, and salient tokens of the deep block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import Scope, TowerScorer, VisionTokens
from pruning_runtime.scorers.similarity import ranks

if TYPE_CHECKING:
    from torch import Tensor


class HiPrune(TowerScorer):
    """Anchors, buffers and registers (HiPrune, arXiv 2508.00553); reads no text and compares no features.

    Of ``k`` tokens, ``round(k alpha / 5)`` anchors are the tokens that receive most attention in the middle block, and
    buffers are their neighbours. Registers fill up: the tokens that receive most attention in the deep block.

    Neighbours are those in the grid of the same image. The publication's code takes the neighbours of the token's
    number, which at the edge of the grid lie in another row.
    """

    name = "hiprune"
    saliency = ("middle_received", "deep_received")
    needs_places = True

    def __init__(self, alpha: float = 0.1, scope: Scope = "tile") -> None:
        super().__init__(scope)
        if not 0 <= alpha <= 5:
            raise TypeError(f"alpha must be in [0, 5], found {alpha!r}")
        self.alpha = alpha

    def score(self, tokens: VisionTokens) -> Tensor:
        import torch

        tower = tokens.tower
        assert tower is not None
        middle = ranks(tower.saliency["middle_received"], tower.has_patch)
        deep = ranks(tower.saliency["deep_received"], tower.has_patch)
        number = (tokens.keep.double() * self.alpha / 5).round()[:, None]
        is_anchor = tower.has_patch & (middle < number)
        most = min(round(tokens.most_kept * self.alpha / 5), middle.shape[1])
        # The anchors come first in this order, so only so many tokens can have neighbours.
        anchors = middle.argsort(1)[:, :most]

        def distance(place: Tensor) -> Tensor:
            return (place[:, :, None] - place.gather(1, anchors)[:, None]).abs()

        beside = (distance(tower.row) + distance(tower.column) == 1) & (distance(tower.image) == 0)
        beside &= is_anchor.gather(1, anchors)[:, None]
        is_buffer = tower.has_patch & beside.any(2)
        # Anchors rank above buffers, and both above all registers.
        slots = middle.shape[1]
        score = torch.where(is_buffer, 2 * slots - deep, -deep)
        return torch.where(is_anchor, 4 * slots - middle, score).float()
