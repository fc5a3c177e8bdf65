"""The paper's rule: text attention weighted by how important each text token is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import AttentionScorer

if TYPE_CHECKING:
    from torch import Tensor


def text_importance(rows: Tensor, text_queries: Tensor, is_text_query: Tensor) -> Tensor:
    """Importance of each text query per head, ``[batch, heads, text queries]``, zero for padding.

    With ``A[T, T]`` the text queries' attention among themselves and ``S = A + A^T - diag(A)``, text query ``t``
    weighs ``sum_i S[i, t]``: what it receives plus what it gives, its attention to itself counted once.
    Arguments as in `AttentionScorer.score_heads`.
    """
    seen = rows.new_zeros(rows.shape[0], rows.shape[3]).scatter_add_(
        1, text_queries, is_text_query.to(rows.dtype)
    )
    given = (seen[:, None, None] @ rows.transpose(2, 3)).squeeze(2)
    return importance_from_sums(rows, rows.sum(2), given, text_queries, is_text_query)


def importance_from_sums(
    rows: Tensor, received: Tensor, given: Tensor, text_queries: Tensor, is_text_query: Tensor
) -> Tensor:
    """`text_importance` for who has the two large sums already.

    Args:
        rows, text queries, is_text_query: as there.
        received: what every key receives from all rows, ``[batch, heads, keys]``.
        given: what every text query gives to all text queries, ``[batch, heads, text queries]``.
    """
    # Sums over all rows first: picking columns out of the rows themselves would copy text queries x text queries.
    received = received.gather(2, text_queries[:, None].expand(*rows.shape[:2], -1))
    # A padding repeats a real position, so as a column it would count that position again.
    received = received * is_text_query[:, None]
    itself = rows.gather(3, text_queries[:, None, :, None].expand(*rows.shape[:3], 1)).squeeze(3)
    return received + given - itself


class TextGuided(AttentionScorer):
    """``sum_h sum_t w[h, t] * A[h, t, v]`` with `text_importance` as ``w`` (arXiv 2508.06084)."""

    name = "text_guided"

    def score_heads(self, rows: Tensor, text_queries: Tensor, is_text_query: Tensor) -> Tensor:
        weights = text_importance(rows, text_queries, is_text_query)
        return (weights[..., None, :] @ rows).squeeze(-2).sum(1)
