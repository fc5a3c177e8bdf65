"""The paper's rule: text attention weighted by the importance of each text query. The only place of this formula."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import AttentionScorer

if TYPE_CHECKING:
    from torch import Tensor


def text_importance(rows: Tensor, text_queries: Tensor, is_text_query: Tensor) -> Tensor:
    """Importance of each text query per head, ``[batch, heads, text queries]``, zero for padding.

    With ``A`` the attention among text queries and ``S = A + A^T - diag(A)``, the importance of text query ``t`` is
    ``sum_i S[i, t]``: the attention it receives plus the attention it gives, with its own entry counted once.
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
    """`text_importance` from two sums that a caller may have already.

    Args:
        rows, text_queries, is_text_query: as in `text_importance`.
        received: attention that every key receives from all rows, ``[batch, heads, keys]``.
        given: attention that every text query gives to all text queries, ``[batch, heads, text queries]``.
    """
    # Columns are gathered from the sums: gathering them from the rows would copy text queries x text queries.
    received = received.gather(2, text_queries[:, None].expand(*rows.shape[:2], -1))
    # A padding entry repeats a position, which must not be counted twice.
    received = received * is_text_query[:, None]
    itself = rows.gather(3, text_queries[:, None, :, None].expand(*rows.shape[:3], 1)).squeeze(3)
    return received + given - itself


def weighted_rows(rows: Tensor, importance: Tensor) -> Tensor:
    """Attention that every key receives, weighted by ``importance`` and summed over heads, ``[batch, keys]``."""
    return (importance[..., None, :] @ rows).squeeze(-2).sum(1)


class TextGuided(AttentionScorer):
    """``sum_h sum_t w[h, t] * A[h, t, v]`` with `text_importance` as ``w`` (arXiv 2508.06084)."""

    name = "text_guided"

    def score_heads(self, rows: Tensor, text_queries: Tensor, is_text_query: Tensor) -> Tensor:
        return weighted_rows(rows, text_importance(rows, text_queries, is_text_query))
