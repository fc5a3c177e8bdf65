"""SCOPE's rule: salient tokens that cover all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import Scope, TowerScorer, VisionTokens
from pruning_runtime.scorers.coverage import Coverage
from pruning_runtime.scorers.similarity import cosine, greedy_scores

if TYPE_CHECKING:
    from torch import Tensor


class SCOPE(TowerScorer):
    """Greedy coverage of the tower's states, weighted by saliency (SCOPE, arXiv 2510.24214); reads no text.

    A chosen token covers every token as far as their cosine goes. Step by step the token is chosen that adds most to
    the cover of all tokens, times its saliency to the power ``alpha``.
    """

    name = "scope"
    needs_states = True

    def __init__(self, alpha: float = 1.0, scope: Scope = "tile") -> None:
        super().__init__(scope)
        if alpha < 0:
            raise TypeError(f"alpha must be at least 0, found {alpha!r}")
        self.alpha = alpha

    def score(self, tokens: VisionTokens) -> Tensor:
        tower = tokens.tower
        assert tower is not None
        assert tower.states is not None
        # Row j says how well token j covers all others; the cosine with padding is 0.
        similarity = cosine(tower.states, tower.states)
        # The scale of saliency does not matter: 1 for the highest keeps small numbers away from underflow.
        saliency = tower.saliency["deep"] / tower.saliency["deep"].amax(1, keepdim=True).clamp(min=1e-30)
        cover = Coverage(similarity, saliency**self.alpha)

        def gains() -> Tensor:
            return cover.gains().masked_fill(~tower.has_patch, -1.0)

        return greedy_scores(tokens.is_token, tokens.most_kept, gains, cover.choose)

    @classmethod
    def flops(cls, tokens: float, kept: float, width: float, text: float) -> float:
        """One product of all states, counted as wide as the decoder's, and three operations per pair in every step."""
        return 2 * tokens * tokens * width + 3 * kept * tokens * tokens
