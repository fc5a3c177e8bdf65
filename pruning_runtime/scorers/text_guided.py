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
    seen = rows.new_zeros(rows.shape[0], rows.shape[3]).scatter_add_(1, raters, is_rater.to(rows.dtype))
    given = (seen[:, None, None] @ rows.transpose(2, 3)).squeeze(2)
    return importance_from_sums(rows, rows.sum(2), given, raters, is_rater)


def importance_from_sums(
    rows: Tensor, received: Tensor, given: Tensor, raters: Tensor, is_rater: Tensor
) -> Tensor:
    """`text_importance` for who has the two large sums already.

    Args:
        rows, raters, is_rater: as there.
        received: what every key receives from all rows, ``[batch, heads, keys]``.
        given: what every rater gives to all raters, ``[batch, heads, raters]``.
    """
    # Sums over all rows first: picking columns out of the rows themselves would copy raters x raters.
    received = received.gather(2, raters[:, None].expand(*rows.shape[:2], -1))
    # A filler repeats a real position, so as a column it would count that position again.
    received = received * is_rater[:, None]
    itself = rows.gather(3, raters[:, None, :, None].expand(*rows.shape[:3], 1)).squeeze(3)
    return received + given - itself


class TextGuided(AttentionScorer):
    """``sum_h sum_t w[h, t] * A[h, t, v]`` with `text_importance` as ``w`` (arXiv 2508.06084)."""

    name = "text_guided"

    def score_heads(self, rows: Tensor, raters: Tensor, is_rater: Tensor) -> Tensor:
        weights = text_importance(rows, raters, is_rater)
        return (weights[..., None, :] @ rows).squeeze(-2).sum(1)
