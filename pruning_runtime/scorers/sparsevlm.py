"""SparseVLM's rule: attention of the text tokens that relate to the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import AttentionScorer, VisionTokens

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDING = 1e-5


class SparseVLM(AttentionScorer):
    """Attention from the text queries that relate to the image, summed over heads and queries (arXiv 2410.04417).

    The text queries are chosen once, before the decoder: a softmax over the text of the products of image and text
    embeddings, averaged over the vision tokens; those above the mean count. The publication's recycled tokens are not
    made: a stage keeps exactly what its keep ratio says.
    """

    name = "sparsevlm"
    needs_text = True
    chooses_text = True

    def score_heads(self, rows: Tensor, text_queries: Tensor, is_text_query: Tensor) -> Tensor:
        return rows.sum((1, 2))

    def choose_text(self, tokens: VisionTokens) -> Tensor:
        products = tokens.features @ tokens.text.transpose(1, 2)  # [groups, slots, text]
        shares = products.masked_fill(~tokens.is_text[:, None], float("-inf")).softmax(2).nan_to_num(0.0)
        mean = (shares * tokens.is_token[..., None]).sum(1) / tokens.is_token.sum(1, keepdim=True).clamp(
            min=1
        )
        level = mean.sum(1, keepdim=True) / tokens.is_text.sum(1, keepdim=True).clamp(min=1)
        # With equal shares all count, whatever rounding did to their mean.
        return tokens.is_text & (mean >= level * (1 - _ROUNDING))
