"""Every rater counts the same: the paper's "no text prior" ablation."""

from __future__ import annotations

from torch import Tensor

from pruning_runtime.scorers.base import AttentionScorer


class UniformText(AttentionScorer):
    """Attention that a vision token receives, summed over heads and raters."""

    name = "uniform_text"

    def score_heads(self, rows: Tensor, raters: Tensor, is_rater: Tensor) -> Tensor:
        return rows.sum((1, 2))
