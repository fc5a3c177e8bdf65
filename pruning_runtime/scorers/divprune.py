"""DivPrune's rule: tokens that are as far from each other as possible."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import FeatureScorer, VisionTokens
from pruning_runtime.scorers.similarity import cosine, greedy_scores

if TYPE_CHECKING:
    from torch import Tensor


class DivPrune(FeatureScorer):
    """Max-min diversity of the features (DivPrune, arXiv 2503.02175); reads no text.

    Distance is 1 - cosine. The first token is the one whose nearest other token is farthest; then, step by step, the
    token whose nearest *chosen* token is farthest.
    """

    name = "divprune"

    def score(self, tokens: VisionTokens) -> Tensor:
        distance = 1 - cosine(tokens.features, tokens.features)
        farthest = float("inf")
        others = distance.masked_fill(~tokens.is_token[:, None], farthest)
        others.diagonal(dim1=1, dim2=2).fill_(farthest)
        # Distances are at most 2: a token without any other ranks as one that is far from all.
        nearest = others.amin(2).clamp(max=4.0)
        is_first = True

        def choose(slot: Tensor) -> None:
            nonlocal nearest, is_first
            column = distance.gather(1, slot[..., None].expand(-1, -1, distance.shape[2])).squeeze(1)
            nearest = column if is_first else nearest.minimum(column)
            is_first = False

        return greedy_scores(tokens.is_token, tokens.most_kept, lambda: nearest, choose)
