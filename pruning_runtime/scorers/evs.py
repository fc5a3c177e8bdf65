"""EVS's rule: tokens that differ from the same place of the frame before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import VisionTokens
from pruning_runtime.scorers.frames import FrameScorer
from pruning_runtime.scorers.similarity import unit_rows

if TYPE_CHECKING:
    from torch import Tensor

_FIRST_FRAME = 4.0
"""Above every distance, which is at most 2."""


class EVS(FrameScorer):
    """Efficient video sampling (arXiv 2510.14624): 1 - cosine with the same place of the frame before.

    Tokens of the first frame rank first, in order. The publication keeps at least that frame; here exactly as many
    tokens are kept as the keep ratio says, so it should be at least one frame's share.
    """

    name = "evs"
    fewest_frames = 2

    def score(self, tokens: VisionTokens) -> Tensor:
        import torch

        directions = unit_rows(tokens.features)
        slot = torch.arange(directions.shape[1], device=directions.device)
        before = slot - self.frame_length(tokens)  # [groups, slots]
        column = before.clamp(min=0)[..., None].expand_as(directions)
        change = 1 - (directions * directions.gather(1, column)).sum(2)
        return change.masked_fill(before < 0, _FIRST_FRAME)

    @classmethod
    def flops(cls, tokens: float, kept: float, width: float, text: float) -> float:
        """A norm and a product per token."""
        return 4 * tokens * width
