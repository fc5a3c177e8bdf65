"""Attention whose temperature grows with a token's place, which the model counts in its cache (Llama 4).

A pruned layer's cache is shorter than the sequence, so a token's place there is lower than its position. The
difference is made up for on the queries, which these layers do not rotate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Temperature:
    """Where a layer's queries come from, and how they are scaled; nothing happens below ``floor``."""

    queries: nn.Module
    floor: int
    strength: float

    def correction(self, positions: Tensor, places: Tensor) -> Tensor:
        """Factor on queries (``[batch, length, 1]``) that stand at ``places`` and belong at ``positions``."""
        return (self._scale(positions) / self._scale(places))[..., None]

    def _scale(self, places: Tensor) -> Tensor:
        return torch.log1p(torch.floor((places.float() + 1) / self.floor)) * self.strength + 1


def find_temperature(layer: nn.Module) -> Temperature | None:
    """The temperature of a decoder layer; None where it does not depend on the place."""
    attention: Any = getattr(layer, "self_attn", None)
    if not getattr(attention, "attn_temperature_tuning", False) or attention.use_rope:
        return None
    return Temperature(attention.q_proj, attention.floor_scale, attention.attn_scale)
