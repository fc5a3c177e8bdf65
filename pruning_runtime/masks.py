"""Attention masks of pruned sequences, in the convention of the attention kernel.

Masks are computed from original positions, so causality, sliding windows and chunks select the same tokens as in the
unpruned model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pruning_runtime.backbone import Backbone
from pruning_runtime.merging import weighted_mask
from pruning_runtime.selection import gather_positions
from pruning_runtime.sequence import Segment


@dataclass(frozen=True)
class AttentionSpan:
    """Keys that a layer may attend to: the last ``window`` positions, or those in the query's chunk; None: all."""

    window: int | None = None
    chunk: int | None = None

    @classmethod
    def of_layers(cls, backbone: Backbone) -> tuple[AttentionSpan, ...]:
        """The attention span of each decoder layer."""
        return tuple(cls.of_kind(kind, backbone.text_model.config) for kind in backbone.layer_kinds)

    @classmethod
    def of_kind(cls, kind: str, config: PreTrainedConfig) -> AttentionSpan:
        """The attention span of layers of one kind."""
        if kind == "sliding_attention":
            return cls(window=config.sliding_window)
        if kind == "chunked_attention":
            return cls(chunk=config.attention_chunk_size)
        return cls()

    def allows(self, queries: Tensor, keys: Tensor, first: Tensor) -> Tensor:
        """Causal mask within the span, bool ``[batch, queries, keys]``.

        Args:
            queries, keys: original positions, ``[batch, ...]``.
            first: position of each row's first token after left padding, ``[batch, 1]``; chunks start there.
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
        """Whether a key before a query can be outside the span."""
        return self.window is not None or self.chunk is not None


def shortened_mask(mask: Tensor, rows: Tensor, columns: Tensor, keys_valid: Tensor) -> Tensor:
    """Gather the rows and columns of the model's own mask that belong to kept tokens.

    Args:
        mask: 2-D key validity ``[batch, length]``, or 4-D ``[batch or 1, heads, length or fewer,
            length]``, bool or additive. Rows are not gathered if the model itself kept the last ones only.
        rows, columns: original positions of the queries and of the keys, ``[batch, ...]``.
        keys_valid: False at keys to mask for all queries, ``[batch, keys]``.
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


def kernel_mask(allowed: Tensor, keys_valid: Tensor, kernel: str, dtype: torch.dtype) -> Tensor:
    """Convert ``allowed`` (bool ``[batch, queries, keys]``) to the form that ``kernel`` takes.

    Eager attention takes an additive mask in ``dtype``, sdpa a bool mask, and flash attention, which is causal by
    itself, the validity of the keys.
    """
    if kernel.startswith("flash"):
        return keys_valid
    allowed = allowed[:, None]
    if kernel == "eager":
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    return allowed


@dataclass(frozen=True)
class MaskBuilder:
    """Builds the masks of all layers, for prompts and for tokens after them.

    Attributes:
        kernel: name of the attention kernel.
        spans: attention span of each decoder layer.
    """

    kernel: str
    spans: tuple[AttentionSpan, ...]

    @classmethod
    def of_backbone(cls, backbone: Backbone) -> MaskBuilder:
        """The builder for the kernel and the layers of a backbone."""
        config = backbone.text_model.config
        return cls(config._attn_implementation, AttentionSpan.of_layers(backbone))

    def build(
        self,
        span: AttentionSpan,
        queries: Tensor,
        keys: Tensor,
        keys_valid: Tensor,
        first: Tensor,
        dtype: torch.dtype,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """A mask from positions.

        Args:
            span: of the layer.
            queries, keys: original positions, ``[batch, ...]``.
            keys_valid: False at keys to mask for all queries, ``[batch, keys]``.
            first: as in `AttentionSpan.allows`.
            dtype: of an additive mask.
            sizes: token sizes of the keys, ``[batch, keys]``; None: all 1.
        """
        allowed = span.allows(queries, keys, first) & keys_valid[:, None, :]
        made = kernel_mask(allowed, keys_valid, self.kernel, dtype)
        return made if sizes is None else weighted_mask(made, sizes, dtype)

    def shorten(
        self, mask: Tensor, queries: Segment, keys: Segment, keys_valid: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The model's own mask of a prompt, for the tokens in ``queries`` and ``keys``; others as in `build`."""
        made = shortened_mask(mask.to(keys.index.device), queries.index, keys.index, keys_valid)
        return made if keys.sizes is None else weighted_mask(made, keys.sizes, dtype)
