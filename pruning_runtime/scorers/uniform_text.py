"""Equal weights for all text queries: the paper's "no text prior" ablation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import AttentionScorer

if TYPE_CHECKING:
    from torch import Tensor


class UniformText(AttentionScorer):
    """Attention that a vision token receives, summed over heads and text queries."""

    name = "uniform_text"

    def score_heads(self, rows: Tensor, text_queries: Tensor, is_text_query: Tensor) -> Tensor:
        return rows.sum((1, 2))
