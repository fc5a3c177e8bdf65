"""The paper's rule: text attention weighted by how important each text token is."""

from __future__ import annotations

from torch import Tensor

from pruning_runtime.scorers.base import AttentionScorer


def text_importance(rows: Tensor, raters: Tensor, is_rater: Tensor) -> Tensor:
    """Importance of each rater per head, ``[batch, heads, raters]``, zero for fillers.

    With ``A[T, T]`` the raters' attention among themselves and ``S = A + A^T - diag(A)``, rater ``t``
    weighs ``sum_i S[i, t]``: what it receives plus what it gives, its attention to itself counted once.
    Arguments as in `AttentionScorer.score_heads`.
    """
    batch, heads, count, _ = rows.shape
    columns = raters[:, None, None, :].expand(batch, heads, count, count)
    # A filler repeats a real position, so as a column it would count that position again.
    among = rows.gather(3, columns) * is_rater[:, None, None, :]
    return among.sum(2) + among.sum(3) - among.diagonal(dim1=2, dim2=3)


class TextGuided(AttentionScorer):
    """``sum_h sum_t w[h, t] * A[h, t, v]`` with `text_importance` as ``w`` (arXiv 2508.06084)."""

    name = "text_guided"

    def score_heads(self, rows: Tensor, raters: Tensor, is_rater: Tensor) -> Tensor:
        weights = text_importance(rows, raters, is_rater)
        return (weights[..., None, :] @ rows).squeeze(-2).sum(1)
