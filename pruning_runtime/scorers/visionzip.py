"""VisionZip's rule: dominant tokens, and contextual tokens that take in all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import Scope, TowerScorer, VisionTokens
from pruning_runtime.scorers.similarity import cosine, nearest, ranks

if TYPE_CHECKING:
    from torch import Tensor


class VisionZip(TowerScorer):
    """Dominant and contextual tokens (VisionZip, arXiv 2412.04467); reads no text.

    Of ``k`` tokens, ``round(contextual k)`` are contextual, 10 of 64 in the publication, and the others are dominant:
    the most salient. Contextual tokens are spread evenly over the rest. Every token that is left joins the contextual
    token with the most similar key, which becomes the sum of itself and the mean of those that join it.

    The publication merges before the projector; here projected features are merged, at the contextual token's position.
    """

    name = "visionzip"
    needs_tower_keys = True
    joins = "add_mean"

    def __init__(self, contextual: float = 10 / 64, scope: Scope = "tile") -> None:
        super().__init__(scope)
        if not 0 <= contextual <= 1:
            raise TypeError(f"contextual must be in [0, 1], found {contextual!r}")
        self.contextual = contextual

    def score(self, tokens: VisionTokens) -> Tensor:
        is_dominant, is_contextual = self._kinds(tokens)
        return 2.0 * is_dominant + is_contextual

    def join(self, tokens: VisionTokens, kept: Tensor) -> Tensor:
        import torch

        tower = tokens.tower
        assert tower is not None
        assert tower.keys is not None
        target = nearest(cosine(tower.keys, tower.keys), self._kinds(tokens)[1] & kept)
        own = torch.arange(target.shape[1], device=target.device)
        return torch.where(tower.has_patch, target, own)

    def _kinds(self, tokens: VisionTokens) -> tuple[Tensor, Tensor]:
        """Dominant and contextual tokens, bool ``[groups, slots]``."""
        tower = tokens.tower
        assert tower is not None
        contextual = (tokens.keep.double() * self.contextual).round().long()[:, None]
        saliency = ranks(tower.saliency["deep"], tower.has_patch)
        is_dominant = tower.has_patch & (saliency < tokens.keep[:, None] - contextual)
        rest = tower.has_patch & ~is_dominant
        number = rest.cumsum(1) - 1
        step = (rest.sum(1, keepdim=True) // contextual.clamp(min=1)).clamp(min=1)
        is_contextual = rest & (number % step == 0) & (number // step < contextual)
        return is_dominant, is_contextual

    @classmethod
    def flops(cls, tokens: float, kept: float, width: float, text: float) -> float:
        """One product of all keys, which are much narrower than ``width``; counted with heads of 64."""
        return 2 * tokens * tokens * 64
