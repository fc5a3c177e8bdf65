"""Scores in, kept tokens out: pure tensor arithmetic that knows no model.

Rows of a batch may keep different numbers of tokens. A stage's width is the most that any row keeps;
shorter rows are filled up on the left, padding first, and the padding are marked invalid. All widths
are known on the host before the decoder starts, so no shape depends on data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning_runtime.schedule import Stage


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage for one batch, on the host.

    ``keep[row]`` vision tokens stay in that row; every row is ``width`` positions wide afterwards.
    ``filled`` says whether any row needs padding.
    """

    layer: int
    keep: tuple[int, ...]
    width: int
    filled: bool


def plan_stages(
    stages: Sequence[Stage], num_vision: Sequence[int], num_other: Sequence[int]
) -> tuple[StagePlan, ...]:
    """Turn ratios into counts for one batch; stages that drop nothing are left out.

    Args:
        stages: the schedule's stages.
        num_vision: vision tokens of each row.
        num_other: valid tokens of each row that are not vision tokens.
    """
    plans = []
    before = tuple(num_vision)
    for stage in stages:
        keep = tuple(stage.kept(vision) for vision in num_vision)
        if keep == before:
            continue
        lengths = [kept + other for kept, other in zip(keep, num_other, strict=True)]
        width = max(lengths)
        plans.append(StagePlan(stage.layer, keep, width, filled=min(lengths) < width))
        before = keep
    return tuple(plans)


def select_kept(
    scores: Tensor,
    vision: Tensor,
    valid: Tensor,
    keep: Tensor,
    width: int,
    protected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the positions that stay.

    Every valid position that is not a vision token stays, and of the vision tokens the ``keep`` best.
    Ties go to the earlier position; a NaN score counts as the lowest. Kept positions stay in their order.
    Protected tokens are better than any other, and equal among themselves.

    Args:
        scores: ``[batch, length]``, higher = keep; read at vision tokens only.
        vision, valid: bool ``[batch, length]``.
        keep: number of vision tokens to keep, integer ``[batch]``.
        width: number of positions to return, at least what any row keeps.
        protected: bool ``[batch, length]``, read at vision tokens only; None where there are none.

    Returns:
        ``(index, is_kept)``, both ``[batch, width]``: positions to gather, padding first, and False at
        the padding.
    """
    length = scores.shape[1]
    position = torch.arange(length, device=scores.device)
    vision = vision & valid
    lowest = torch.finfo(torch.float32).min
    ranked = torch.nan_to_num(scores.float(), nan=lowest, neginf=lowest)
    if protected is not None:
        ranked = ranked.masked_fill(protected, float("inf"))  # other scores are finite by now
    ranked = ranked.masked_fill(~vision, float("-inf"))
    rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept = valid & (~vision | (rank < keep[:, None]))

    # Three groups, each in the order of its positions: dropped, then padding, then kept.
    group = torch.where(kept, 2, torch.where(valid, 0, 1))
    index = (group * length + position).argsort(dim=1)[:, length - width :]
    return index, kept.gather(1, index)


def merge_dropped(
    hidden: Tensor,
    weights: Tensor | None,
    scores: Tensor,
    vision: Tensor,
    valid: Tensor,
    place: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor]:
    """Let one kept vision token of each row stand for all that are dropped.

    That token is the one that already stands for others, or else the worst that is kept. Its state becomes the
    mean over itself and the dropped, each counting for as many tokens as it stands for. A row that keeps no
    vision token loses them all; one that drops none is left as it is.

    Args:
        hidden: ``[batch, length, features]``, before the drop.
        weights: tokens that each position stands for, ``[batch, length]``; None: one each.
        scores, vision, valid: as for `select_kept`, ``[batch, length]``.
        place, kept: what `select_kept` returned, ``[batch, width]``.

    Returns:
        The gathered states ``[batch, width, features]`` and the weights ``[batch, width]``, float32.
    """
    if weights is None:
        weights = torch.ones_like(scores, dtype=torch.float32)
    stays = torch.zeros_like(valid).scatter_(1, place, kept)
    gone = vision & valid & ~stays
    kept_vision = vision.gather(1, place) & kept
    here = weights.gather(1, place)
    worst = torch.nan_to_num(scores.float()).gather(1, place)
    # Tokens that stand for others come before all, then the worst by score.
    order = torch.where(here > 1, float("-inf"), worst).masked_fill(~kept_vision, float("inf"))
    slot = order.argmin(1, keepdim=True)
    takes = kept_vision.gather(1, slot) & gone.any(1, keepdim=True)

    share = (weights * gone).scatter_add(1, place.gather(1, slot), here.gather(1, slot))
    total = share.sum(1, keepdim=True)
    mean = (share[:, None] / total[..., None] @ hidden.float()).to(hidden.dtype)
    gathered = gather_positions(hidden, place, 1)
    column = slot[..., None].expand(-1, -1, hidden.shape[2])
    mean = torch.where(takes[..., None], mean, gathered.gather(1, column))
    total = torch.where(takes, total, here.gather(1, slot))
    return gathered.scatter(1, column, mean), here.scatter(1, slot, total)


def gather_positions(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather ``index`` (``[batch, width]``) along dimension ``dim`` of ``tensor``.

    The dimension before ``dim`` is the batch; where it is 1 (a table shared by all rows) it is expanded.
    Other dimensions are taken whole.
    """
    batch, width = index.shape
    index = index.to(tensor.device)
    if dim == 1 and tensor.dim() > 2:
        return _gather_rows(tensor, index)
    shape = list(tensor.shape)
    shape[dim - 1] = batch
    tensor = tensor.expand(shape)
    shape[dim] = width
    aligned = index.view(*[1] * (dim - 1), batch, width, *[1] * (tensor.dim() - dim - 1))
    return tensor.gather(dim, aligned.expand(shape))


def _gather_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """`gather_positions` of whole feature vectors, which is several times faster than one number at a time."""
    batch, width = index.shape
    if tensor.shape[0] == 1:
        rows = tensor[0]
    else:
        rows = tensor.flatten(0, 1)
        index = index + tensor.shape[1] * torch.arange(batch, device=index.device)[:, None]
    return rows.index_select(0, index.flatten()).view(batch, width, *tensor.shape[2:])
