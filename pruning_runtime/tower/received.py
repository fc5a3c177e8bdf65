"""Saliency of tower positions from queries and keys. Pure tensor functions.

Attention is computed in float32 for a few queries at a time; no map of positions x positions is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pruning_runtime.attention_rows import chunk_bytes_on


def received_attention(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Attention that every position receives, float32 ``[batch, length]``.

    The mean over heads and over the queries that can attend to the position: those of its own image where images
    are packed into one sequence, and never those of padding.

    Args:
        query: ``[batch, heads, length, head_dim]``, after RoPE.
        key: ``[batch, kv_heads, length, head_dim]``, after RoPE, not repeated.
        mask: None (every position sees every position), bool or additive
            ``[batch or 1, heads or 1, length or 1, length]``, or key validity ``[batch, length]``.
        scaling: factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before masking.
    """
    batch, heads, length, _ = query.shape
    visible = None if mask is None else _visible(mask, batch, length)
    # Padding is what no query attends to.
    real = None if visible is None else visible.any(-2)
    rows = max(1, chunk_bytes_on(query.device) // (batch * heads * length * 4))
    received = query.new_zeros(batch, length, dtype=torch.float32)
    viewers = query.new_zeros(batch, length, dtype=torch.float32)
    for first in range(0, length, rows):
        part = slice(first, first + rows)
        attention = attention_of(query[:, :, part], key, _rows(mask, part), scaling, softcap)
        if real is None or visible is None:
            received += attention.sum((1, 2))
            continue
        here = real[:, part, None].float()
        received += (attention.sum(1) * here).sum(1)
        viewers += (visible[:, part] * here).sum(1)
    return received / heads / (length if real is None else viewers.clamp(min=1))


def attention_of(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Attention of some queries, float32 ``[batch, heads, queries, length]``; arguments as `received_attention`.

    ``mask`` has the rows of these queries.
    """
    batch, heads, width, head_dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    grouped = query.float().reshape(batch, kv_heads, heads // kv_heads * width, head_dim)
    logits = (grouped @ key.float().transpose(-1, -2)).view(batch, heads, width, length) * scaling
    if softcap is not None:
        logits = (logits / softcap).tanh_() * softcap
    if mask is not None:
        mask = mask[:, None, None] if mask.dim() == 2 else mask
        if mask.is_floating_point():
            # A row that is hidden altogether must not become NaN.
            logits = logits + mask.float().clamp(min=torch.finfo(torch.float32).min)
        else:
            logits = logits.masked_fill(~mask.bool(), torch.finfo(torch.float32).min)
    return logits.softmax(-1)


def _rows(mask: Tensor | None, part: slice) -> Tensor | None:
    """The rows ``part`` of a mask; a mask with one row for all queries stays."""
    return mask if mask is None or mask.dim() == 2 or mask.shape[2] == 1 else mask[:, :, part]


def _visible(mask: Tensor, batch: int, length: int) -> Tensor:
    """Which keys each query can attend to, bool ``[batch, length, length]`` (an expanded view where possible).

    All heads of a tower share one mask.
    """
    mask = mask[:, None, None] if mask.dim() == 2 else mask
    seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
    return seen[:, 0].expand(batch, length, length)
