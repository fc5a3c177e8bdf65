"""Attention of chosen query rows, computed from q and k a few heads at a time.

Pure tensor functions. Keys and values are not repeated under grouped-query attention, probabilities are float32, and no
tensor of size ``length x length`` is made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK_BYTES = {"cpu": 2**20}
_CHUNK_BYTES_ELSEWHERE = 64 * 2**20


def chunk_bytes_on(device: torch.device) -> int:
    """Bytes of the largest block of attention rows; on a CPU, a block should fit into the cache."""
    return _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_ELSEWHERE)


def find_text_queries(vision: Tensor, valid: Tensor, answer_length: int = 0) -> Tensor:
    """Text queries of each row: valid, non-vision tokens after the row's first vision token.

    Args:
        vision, valid: bool ``[batch, length]``.
        answer_length: last positions of each row that are a given answer; they are not text queries.

    Returns:
        bool ``[batch, length]``.
    """
    after_vision = vision.cumsum(1) > 0
    found = valid & ~vision & after_vision
    found[:, max(vision.shape[1] - answer_length, 0) :] = False
    return found


def padded_indices(is_text_query: Tensor, width: int, *, last_only: bool = False) -> tuple[Tensor, Tensor]:
    """Positions of text queries as a rectangular index tensor.

    Args:
        is_text_query: bool ``[batch, length]``.
        width: entries per row, at least the maximum number of text queries in a row (known on the host).
        last_only: take only the last text query of each row; ``width`` is then 1.

    Returns:
        ``(positions, real)``, both ``[batch, width]``; entries that are not ``real`` are padding.
    """
    length = is_text_query.shape[1]
    position = torch.arange(length, device=is_text_query.device)
    key = torch.where(is_text_query, position, position - length)
    # Text queries sort last, and among themselves by position.
    positions = key.argmax(1, keepdim=True) if last_only else key.argsort(dim=1)[:, length - width :]
    return positions, is_text_query.gather(1, positions)


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    real: Tensor,
    mask: Tensor | None,
    scaling: float,
    *,
    softcap: float | None = None,
    sliding_window: int | None = None,
    chunk_bytes: int | None = None,
) -> Iterator[Tensor]:
    """Yield softmax attention of the chosen query rows over all keys, head group by head group.

    Args:
        query: ``[batch, heads, length, head_dim]``, after RoPE.
        key: ``[batch, kv_heads, length, head_dim]``, after RoPE, not repeated.
        rows: query positions, ``[batch, width]``.
        real: False at padding entries of ``rows``, ``[batch, width]``; their rows are zero.
        mask: the attention kernel's: None (causal), bool or additive
            ``[batch or 1, heads or 1, length, length]``, or 2-D key validity ``[batch, length]`` (causal).
        scaling: factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before masking.
        sliding_window: applied with masks that do not contain it (None and 2-D): a query attends to itself and the
            ``sliding_window - 1`` keys before it.
        chunk_bytes: upper bound for one yielded block, but at least one head; None: `chunk_bytes_on` the device.

    Yields:
        float32 ``[batch, some heads, width, length]``; all blocks together cover every head once,
        in order.
    """
    if chunk_bytes is None:
        chunk_bytes = chunk_bytes_on(query.device)
    arguments = (query, key, rows, real, mask, scaling, softcap, sliding_window, chunk_bytes)
    for _, attention in attention_rows_and_logits(*arguments):
        yield attention


def attention_rows_and_logits(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    real: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sliding_window: int | None,
    chunk_bytes: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `attention_rows`, but yield ``(logits, probabilities)``; the caller may change both in place.

    Logits of masked keys are about the lowest finite number. No gradient flows.
    """
    query, key = query.detach(), key.detach()
    batch, heads, _, head_dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    width = rows.shape[1]
    group = heads // kv_heads
    picked = query.gather(2, rows[:, None, :, None].expand(batch, heads, width, head_dim))
    picked = picked.view(batch, kv_heads, group, width, head_dim)
    bias = _bias(rows, mask, length, sliding_window)

    per_head = batch * width * length * 4
    whole_groups = max(1, min(kv_heads, chunk_bytes // (per_head * group)))
    part_of_group = max(1, min(group, chunk_bytes // per_head))
    for first_kv in range(0, kv_heads, whole_groups):
        kv = slice(first_kv, first_kv + whole_groups)
        keys = key[:, kv].transpose(-1, -2)
        for first in range(0, group, part_of_group):
            some = picked[:, kv, first : first + part_of_group]
            count = some.shape[2]
            logits = some.reshape(batch, -1, count * width, head_dim) @ keys
            logits = logits.view(batch, -1, width, length).float()
            these = slice(first_kv * group + first, first_kv * group + first + logits.shape[1])
            hides = bias if bias.shape[1] == 1 else bias[:, these]
            if softcap is None:
                torch.add(hides, logits, alpha=scaling, out=logits)
            else:
                logits.mul_(scaling / softcap).tanh_().mul_(softcap).add_(hides)
            yield logits, logits.softmax(-1).mul_(real[:, None, :, None])


def _row_index(rows: Tensor, mask: Tensor) -> Tensor:
    """Index that gathers ``rows`` from a 4-D mask whose batch dimension may be 1."""
    return rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])


def _bias(rows: Tensor, mask: Tensor | None, length: int, sliding_window: int | None) -> Tensor:
    """Additive mask of the rows, float32 ``[batch, heads or 1, width, length]``.

    Masked keys get a finite number, so that a row without visible keys is not NaN. Adding takes a CPU a third of the
    time of `masked_fill`.
    """
    lowest = torch.finfo(torch.float32).min
    if mask is not None and mask.dim() == 4:
        mask = mask.expand(rows.shape[0], -1, -1, -1)
        picked = mask.gather(2, _row_index(rows, mask))
        if mask.dtype != torch.bool:
            return picked.float().clamp(min=torch.finfo(mask.dtype).min)
        blocked = ~picked
    else:
        distance = rows[:, :, None] - torch.arange(length, device=rows.device)
        blocked = distance < 0
        if sliding_window is not None:
            blocked = blocked | (distance >= sliding_window)
        if mask is not None:
            blocked = blocked | ~mask.bool()[:, None, :]
        blocked = blocked[:, None]
    return torch.zeros(blocked.shape, device=rows.device).masked_fill_(blocked, lowest)
