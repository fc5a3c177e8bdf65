"""DART's rule: tokens that differ from a few pivot tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import FeatureScorer, Scope, VisionTokens
from pruning_runtime.scorers.similarity import cosine

if TYPE_CHECKING:
    from torch import Tensor


class Dart(FeatureScorer):
    """Duplication-aware reduction (DART, arXiv 2502.11494), after a decoder layer.

    Pivots are the ``vision_pivots`` vision and ``text_pivots`` text tokens with the largest L1 norm of their keys. Vision
    pivots are kept. Every pivot in turn, vision first and by falling norm, then takes an equal share of the remaining
    places: the tokens, not taken yet, whose states have the least cosine with its own. Exactly the number of tokens
    that was asked for is kept; the public scripts keep a few more, and go through the pivots in no stated order.
    """

    name = "dart"
    needs_text = True
    needs_layer = True
    needs_keys = True
    after_final_norm = True

    def __init__(self, vision_pivots: int = 4, text_pivots: int = 4, scope: Scope = "sample") -> None:
        super().__init__(scope)
        if vision_pivots < 0 or text_pivots < 0 or vision_pivots + text_pivots == 0:
            raise TypeError("vision_pivots and text_pivots must not be negative, nor both 0")
        self.vision_pivots, self.text_pivots = vision_pivots, text_pivots

    def score(self, tokens: VisionTokens) -> Tensor:
        import torch

        assert tokens.key_norms is not None
        assert tokens.text_key_norms is not None
        vision, vision_real = _largest(tokens.key_norms, tokens.is_token, self.vision_pivots)
        text, text_real = _largest(tokens.text_key_norms, tokens.is_text, self.text_pivots)
        width = tokens.features.shape[2]
        pivots = torch.cat(
            [
                tokens.features.gather(1, vision[..., None].expand(-1, -1, width)),
                tokens.text.gather(1, text[..., None].expand(-1, -1, width)),
            ],
            1,
        )
        real = torch.cat([vision_real, text_real], 1)
        similar = cosine(pivots, tokens.features)  # [groups, pivots, slots]
        count = vision_real.sum(1).minimum(tokens.keep)
        scores = torch.full(tokens.is_token.shape, -float(1 << 20), device=tokens.is_token.device)
        order = -torch.arange(vision.shape[1], device=scores.device, dtype=scores.dtype).expand_as(vision)
        scores.scatter_(1, vision, torch.where(vision_real, order, scores.gather(1, vision)))
        is_open = tokens.is_token.clone().scatter_(1, vision, False)
        quota = _shares(tokens.keep - count, real)
        for pivot in range(pivots.shape[1]):
            rank = (
                similar[:, pivot].masked_fill(~is_open, float("inf")).argsort(dim=1, stable=True).argsort(1)
            )
            taken = is_open & (rank < quota[:, pivot : pivot + 1])
            scores = torch.where(taken, -float(vision.shape[1] + pivot), scores)
            is_open = is_open & ~taken
        return scores

    @classmethod
    def flops(cls, tokens: float, kept: float, width: float, text: float) -> float:
        """Similarities with the pivots of the default options."""
        return 2 * tokens * 8 * width


def _largest(values: Tensor, real: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Slots of the ``count`` largest values of each group, and whether they are real, ``[groups, count]``."""
    count = min(count, values.shape[1])
    order = values.masked_fill(~real, float("-inf")).argsort(dim=1, descending=True, stable=True)[:, :count]
    return order, real.gather(1, order)


def _shares(total: Tensor, real: Tensor) -> Tensor:
    """``total`` of each group in equal parts over its real pivots, the first ones one more, ``[groups, pivots]``."""
    number = real.sum(1).clamp(min=1)
    share, rest = total.clamp(min=0) // number, total.clamp(min=0) % number
    place = real.long().cumsum(1) - 1
    return (share[:, None] + (place < rest[:, None]).long()) * real
