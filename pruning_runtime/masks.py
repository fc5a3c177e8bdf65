"""Attention masks of shortened sequences, in the convention of the kernel that reads them.

Visibility is always measured in original positions, so causality, sliding windows and
chunks mean the same tokens as in the unpruned model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pruning_runtime.backbone import Backbone
from pruning_runtime.selection import gather_positions

_UNSEEN = -65504.0
"""Added to logits of keys that are not seen, where other keys have weights: the least float16, and enough.

Fused kernels count in powers of two, so the least numbers of other types overflow there; some then make a row that
sees nothing NaN, and its values, times a probability of zero, all others in the next layer.
"""


@dataclass(frozen=True)
class AttentionSpan:
    """How far back a layer looks: ``window`` positions, or within ``chunk``-sized chunks; None: everything."""

    window: int | None = None
    chunk: int | None = None

    @classmethod
    def of_layers(cls, backbone: Backbone) -> tuple[AttentionSpan, ...]:
        """The reach of each decoder layer."""
        return tuple(cls.of_kind(kind, backbone.text_model.config) for kind in backbone.layer_kinds)

    @classmethod
    def of_kind(cls, kind: str, config: PreTrainedConfig) -> AttentionSpan:
        """The reach of layers of one kind."""
        if kind == "sliding_attention":
            return cls(window=config.sliding_window)
        if kind == "chunked_attention":
            return cls(chunk=config.attention_chunk_size)
        return cls()

    def allows(self, queries: Tensor, keys: Tensor, first: Tensor) -> Tensor:
        """Which original positions ``keys`` (``[batch, k]``) each of ``queries`` (``[batch, q]``) may see.

        Chunks are counted from ``first`` (``[batch, 1]``), where each row's prompt begins after padding.
        """
        query, key = queries[:, :, None], keys[:, None, :]
        allowed = key <= query
        if self.window is not None:
            allowed = allowed & (query - key < self.window)
        if self.chunk is not None:
            start = first[:, :, None]
            allowed = allowed & ((query - start) // self.chunk == (key - start) // self.chunk)
        return allowed

    @property
    def limited(self) -> bool:
        """Whether anything before a query can be out of its reach."""
        return self.window is not None or self.chunk is not None


def shortened_mask(mask: Tensor, rows: Tensor, columns: Tensor, keys_valid: Tensor) -> Tensor:
    """Cut the model's own mask to the places that are left.

    Args:
        mask: 2-D key validity ``[batch, length]``, or 4-D ``[batch or 1, heads, length or fewer,
            length]``, bool or additive; rows that the model itself cut are left as they are.
        rows, columns: original positions of the queries and of the keys, ``[batch, ...]``.
        keys_valid: False at keys that nobody may see, ``[batch, keys]``.
    """
    if mask.dim() == 2:
        return gather_positions(mask, columns, 1) * keys_valid
    length = mask.shape[3]
    mask = mask.expand(len(columns), *mask.shape[1:])
    if mask.shape[2] == length:
        mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, length))
    mask = mask.gather(3, columns[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
    hidden = ~keys_valid[:, None, None, :]
    return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def weighted_mask(mask: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask in which a key that stands for ``n`` tokens gets ``n`` times the attention of one.

    Args:
        mask: 4-D, bool or additive.
        weights: tokens that each key stands for, ``[batch, keys]``, at least 1.
        dtype: of the result where ``mask`` is bool.
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, _UNSEEN)
    return mask + weights.log().to(mask.dtype)[:, None, None, :]


def kernel_mask(allowed: Tensor, keys_valid: Tensor, kernel: str, dtype: torch.dtype) -> Tensor:
    """``allowed`` (bool ``[batch, queries, keys]``) as ``kernel`` wants it.

    Eager attention adds a mask in the model's ``dtype``; flash attention is causal by itself and takes
    key validity; sdpa takes bool.
    """
    if kernel.startswith("flash"):
        return keys_valid
    allowed = allowed[:, None]
    if kernel == "eager":
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    return allowed
