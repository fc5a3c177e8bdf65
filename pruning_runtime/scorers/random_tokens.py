"""Baseline: random tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import PositionScorer

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 1 << 17
"""Positions that a random order covers. The whole order is drawn, so that all stages of a prefill use the same one."""


class RandomTokens(PositionScorer):
    """A random order per prefill, the same for all rows of a batch and for all stages.

    The beams of one prompt therefore keep the same tokens. ``seed`` and the number of the prefill determine the order.
    """

    name = "random"
    counts_prefills = True

    def __init__(self, seed: int = 0) -> None:
        if not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, found {seed!r}")
        self.seed = seed

    def score_positions(self, vision: Tensor, position: Tensor, keep: Tensor, forward: int) -> Tensor:
        import torch  # here, so that reading a schedule does not import it

        # Drawn on the CPU, so that all devices keep the same tokens.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + forward)
        order = torch.rand(LONGEST, generator=generator)
        return order.to(vision.device, non_blocking=True)[position]
