"""V2Drop's rule: tokens that a decoder layer changes most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import FeatureScorer, VisionTokens

if TYPE_CHECKING:
    from torch import Tensor


class V2Drop(FeatureScorer):
    """Euclidean distance between a token's states before and after the stage's layer (V2Drop, arXiv 2509.01552)."""

    name = "v2drop"
    needs_layer = True

    def score(self, tokens: VisionTokens) -> Tensor:
        assert tokens.previous is not None
        return (tokens.features - tokens.previous).norm(dim=-1)

    @classmethod
    def flops(cls, tokens: float, kept: float, width: float, text: float) -> float:
        """One difference and one norm per token."""
        return 3 * tokens * width
