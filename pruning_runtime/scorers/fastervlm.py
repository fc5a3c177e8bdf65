"""FasterVLM's rule: the tokens that the vision tower attends to most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import TowerScorer, VisionTokens

if TYPE_CHECKING:
    from torch import Tensor


class FasterVLM(TowerScorer):
    """Saliency in the block that feeds the decoder (FasterVLM, arXiv 2412.01818); reads no text."""

    name = "fastervlm"

    def score(self, tokens: VisionTokens) -> Tensor:
        assert tokens.tower is not None
        return tokens.tower.saliency["deep"].masked_fill(~tokens.tower.has_patch, -1.0)
