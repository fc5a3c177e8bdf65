"""FastV's rule: attention of the last prompt token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import AttentionScorer

if TYPE_CHECKING:
    from torch import Tensor


class LastToken(AttentionScorer):
    """Attention from the sample's last text query, summed over heads (FastV, arXiv 2403.06764)."""

    name = "last_token"
    last_row_only = True

    def score_heads(self, rows: Tensor, text_queries: Tensor, is_text_query: Tensor) -> Tensor:
        return rows.sum((1, 2))
