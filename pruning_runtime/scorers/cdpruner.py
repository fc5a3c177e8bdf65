"""CDPruner's rule in its embedding form: diverse tokens that are relevant to the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import FeatureScorer, Scope, VisionTokens
from pruning_runtime.scorers.similarity import cosine, greedy_scores

if TYPE_CHECKING:
    from torch import Tensor

_SMALL = 1e-6
_ROUNDING = 2.0**-22
"""Twice the rounding error of float32. After ``i`` choices up to about half of ``i`` times this share of the kernel's
largest entry is left where the exact residual is 0: below ``i`` times it, the chosen tokens span all others."""


def relevance(tokens: VisionTokens) -> Tensor:
    """Cosine of each token with the mean text embedding, scaled to (0, 1] over a sample, ``[groups, slots]``.

    Minimum and maximum are taken over all groups of a row together. Equal relevance gives 1 everywhere.
    """
    is_text = tokens.is_text[..., None]
    mean = (tokens.text * is_text).sum(1, keepdim=True) / is_text.sum(1, keepdim=True).clamp(min=1)
    raw = cosine(tokens.features, mean).squeeze(2)
    shape = raw.shape
    raw = raw.view(-1, tokens.groups_per_row * shape[1])
    real = tokens.is_token.view(raw.shape)
    low = raw.masked_fill(~real, float("inf")).amin(1, keepdim=True)
    span = raw.masked_fill(~real, float("-inf")).amax(1, keepdim=True) - low
    scaled = (raw - low + _SMALL) / span.clamp(min=_SMALL)
    return scaled.masked_fill(~real | (span < _SMALL), 1.0).clamp(max=1.0 + _SMALL).view(shape)


class CDPruner(FeatureScorer):
    """Greedy determinant maximization over ``q_i cos(x_i, x_j) q_j`` (CDPruner, arXiv 2506.10967).

    ``q = exp(a r)`` with relevance ``r`` and ``a = w / (2 (1 - w))``: the form without a CLIP text tower, which works on
    any backbone. ``weight`` is ``w``: 0 ignores the text. Where the chosen tokens span all others, the rest is filled by
    relevance.
    """

    name = "cdpruner"
    needs_text = True

    def __init__(self, weight: float = 0.5, scope: Scope = "image") -> None:
        super().__init__(scope)
        if not 0 <= weight < 1:
            raise TypeError(f"weight must be in [0, 1), found {weight!r}")
        self.weight = weight

    def score(self, tokens: VisionTokens) -> Tensor:
        import torch

        relevant = relevance(tokens)
        quality = (relevant * self.weight / (2 * (1 - self.weight))).exp()
        kernel = quality[:, :, None] * cosine(tokens.features, tokens.features) * quality[:, None]
        residual = kernel.diagonal(dim1=1, dim2=2).clone().clamp(min=0)
        largest = residual.amax(1, keepdim=True)
        steps = min(tokens.most_kept, residual.shape[1])
        basis = torch.zeros(len(kernel), steps, kernel.shape[2], device=kernel.device)
        step = 0

        def exhausted() -> Tensor:
            return _ROUNDING * max(step, 8) * largest

        def gains() -> Tensor:
            # Any relevance minus 2 is below all residuals, so it decides among exhausted tokens only.
            return torch.where(residual > exhausted(), residual, relevant - 2)

        def choose(slot: Tensor) -> None:
            nonlocal residual, step
            whole = slot[..., None].expand(-1, steps, 1)
            row = kernel.gather(1, slot[..., None].expand(-1, 1, kernel.shape[2])).squeeze(1)
            row = row - (basis.gather(2, whole) * basis).sum(1)
            own = residual.gather(1, slot)
            row = torch.where(own > exhausted(), row / own.clamp(min=1e-30).sqrt(), 0.0)
            basis[:, step] = row
            residual = (residual - row**2).clamp(min=0)
            step += 1

        return greedy_scores(tokens.is_token, steps, gains, choose)
