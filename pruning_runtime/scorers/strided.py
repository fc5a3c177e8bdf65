"""Control: evenly strided tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from pruning_runtime.scorers.base import PositionScorer


class Strided(PositionScorer):
    """Evenly spread tokens, in an order in which every prefix is evenly spread.

    The van der Corput sequence (bit reversal of the token's rank in its row) gives nested choices:
    exactly strided where the kept count divides the row's by a power of two, near that otherwise.
    """

    name = "strided"

    def score_positions(self, vision: Tensor, forward: int) -> Tensor:
        rank = vision.long().cumsum(1) - 1
        total = vision.sum(1, keepdim=True).clamp(min=1)
        bits = max(1, (vision.shape[1] - 1).bit_length())
        # Spread the row's ranks over a power of two, so that the reversal covers it evenly.
        slot = (rank.clamp(min=0) * (1 << bits)) // total
        reversed_slot = torch.zeros_like(slot)
        for bit in range(bits):
            reversed_slot |= ((slot >> bit) & 1) << (bits - 1 - bit)
        return -reversed_slot.float()
