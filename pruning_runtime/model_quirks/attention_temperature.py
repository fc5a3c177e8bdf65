"""Attention whose temperature grows with a token's position, which the model counts in its cache (Llama 4).

A pruned layer's cache is shorter than the sequence, so the counted position is too low. The difference is corrected on
the queries, which these layers do not rotate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Temperature:
    """A layer's query map and the scaling of its queries, which is 1 at positions below ``floor``."""

    queries: nn.Module
    floor: int
    strength: float

    def correction(self, original: Tensor, in_cache: Tensor) -> Tensor:
        """Factor on queries that are at position ``in_cache`` of the cache, ``[batch, length, 1]``."""
        return (self._scale(original) / self._scale(in_cache))[..., None]

    def _scale(self, positions: Tensor) -> Tensor:
        return torch.log1p(torch.floor((positions.float() + 1) / self.floor)) * self.strength + 1


def find_temperature(layer: nn.Module) -> Temperature | None:
    """The temperature of a decoder layer; None if it does not depend on the position."""
    attention: Any = getattr(layer, "self_attn", None)
    if not getattr(attention, "attn_temperature_tuning", False) or attention.use_rope:
        return None
    return Temperature(attention.q_proj, attention.floor_scale, attention.attn_scale)
