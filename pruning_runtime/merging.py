"""Token merging with proportional attention (ToMe, arXiv 2210.09461), and joining by a scorer's own rule.

Pure tensor functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pruning_runtime.selection import gather_positions

_MASKED = -65504.0
"""Added to the logits of masked keys in `weighted_mask`: the lowest float16 number.

Fused kernels work in powers of two, in which the lowest numbers of other types overflow. Some kernels then return NaN
for a row without any visible key, and NaN spreads to all rows in the next layer.
"""


def merge_dropped(
    hidden: Tensor,
    sizes: Tensor | None,
    scores: Tensor,
    vision: Tensor,
    valid: Tensor,
    index: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor]:
    """Merge all vision tokens that a stage drops into one kept vision token of their row.

    The target is the kept token that was merged before, or else the kept token with the lowest score. Its state
    becomes the mean of itself and the dropped tokens, weighted by token size; its size becomes the sum. A row that
    keeps no vision token loses all of them. A row that drops none is unchanged.

    Args:
        hidden: states before the stage, ``[batch, length, features]``.
        sizes: token sizes, ``[batch, length]``; None: all 1.
        scores, vision, valid: as for `select_kept`, ``[batch, length]``.
        index, kept: result of `select_kept`, ``[batch, width]``.

    Returns:
        States ``[batch, width, features]`` and token sizes ``[batch, width]``, float32.
    """
    if sizes is None:
        sizes = torch.ones_like(scores, dtype=torch.float32)
    is_kept = torch.zeros_like(valid).scatter_(1, index, kept)
    dropped = vision & valid & ~is_kept
    kept_vision = vision.gather(1, index) & kept
    kept_sizes = sizes.gather(1, index)
    lowest = torch.nan_to_num(scores.float()).gather(1, index)
    # The target sorts first: a token merged before, then the lowest score.
    order = torch.where(kept_sizes > 1, float("-inf"), lowest).masked_fill(~kept_vision, float("inf"))
    target = order.argmin(1, keepdim=True)
    merges = kept_vision.gather(1, target) & dropped.any(1, keepdim=True)

    share = (sizes * dropped).scatter_add(1, index.gather(1, target), kept_sizes.gather(1, target))
    total = share.sum(1, keepdim=True)
    mean = (share[:, None] / total[..., None] @ hidden.float()).to(hidden.dtype)
    gathered = gather_positions(hidden, index, 1)
    column = target[..., None].expand(-1, -1, hidden.shape[2])
    mean = torch.where(merges[..., None], mean, gathered.gather(1, column))
    total = torch.where(merges, total, kept_sizes.gather(1, target))
    return gathered.scatter(1, column, mean), kept_sizes.scatter(1, target, total)


def join_dropped(features: Tensor, kept: Tensor, target: Tensor, joining: str | None) -> Tensor:
    """Features of the kept tokens after the dropped ones have joined them.

    A kept token that none joins is unchanged. Token sizes do not change: the rules that join tokens (VisionZip, VScan)
    use plain attention.

    Args:
        features: ``[groups, slots, width]``.
        kept: bool ``[groups, slots]``.
        target: for every token the slot of the kept token that it joins, or its own, long ``[groups, slots]``.
        joining: "mean": the kept token becomes the mean of itself and those that join it; "add_mean": the mean of those
            that join it is added to it.
    """
    joins = ~kept & kept.gather(1, target)
    column = target[..., None].expand_as(features)
    sums = torch.zeros_like(features).scatter_add_(1, column, features * joins[..., None])
    counts = torch.zeros_like(features[..., 0]).scatter_add_(1, target, joins.to(features.dtype))[..., None]
    mean_of_all = (features + sums) / (1 + counts)
    changed = mean_of_all if joining == "mean" else features + sums / counts.clamp(min=1)
    return torch.where(counts > 0, changed, features)


def weighted_mask(mask: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask for proportional attention: a key of size ``n`` gets ``n`` times the attention.

    Args:
        mask: 4-D, bool or additive.
        sizes: token sizes of the keys, ``[batch, keys]``, at least 1.
        dtype: of the result if ``mask`` is bool.
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, _MASKED)
    return mask + sizes.log().to(mask.dtype)[:, None, None, :]
