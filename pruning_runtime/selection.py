"""Scores to kept indices: pure tensor functions.

Rows of a batch may keep different numbers of tokens. The width of a stage is the maximum over the rows. Shorter rows
are padded on the left, and padding is marked invalid. All widths are known on the host before the decoder starts, so
no shape depends on data.
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

    Attributes:
        layer: of the stage.
        keep: vision tokens to keep in each row.
        width: slots of every row after the stage.
        padded: whether any row needs padding.
        most_kept: maximum of ``keep``, or more: the number of steps of a greedy scorer.
    """

    layer: int
    keep: tuple[int, ...]
    width: int
    padded: bool
    most_kept: int


def plan_stages(
    stages: Sequence[Stage], num_vision: Sequence[int], num_other: Sequence[int]
) -> tuple[StagePlan, ...]:
    """Convert keep ratios to counts for one batch. Stages that drop nothing are omitted.

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
        plans.append(StagePlan(stage.layer, keep, width, min(lengths) < width, max(keep)))
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
    """Choose the slots to keep.

    All valid slots without a vision token are kept, and the ``keep`` vision tokens with the highest scores. Ties go
    to the earlier slot. NaN counts as the lowest score. Kept slots keep their order. Protected tokens rank above all
    others and tie among themselves.

    Args:
        scores: ``[batch, length]``, higher = keep; read at vision tokens only.
        vision, valid: bool ``[batch, length]``.
        keep: number of vision tokens to keep, integer ``[batch]``.
        width: slots to return, at least as many as any row keeps.
        protected: bool ``[batch, length]``, read at vision tokens only; None: no token is protected.

    Returns:
        ``(index, is_kept)``, both ``[batch, width]``: slots to gather, padding first, and False at padding.
    """
    length = scores.shape[1]
    position = torch.arange(length, device=scores.device)
    vision = vision & valid
    lowest = torch.finfo(torch.float32).min
    ranked = torch.nan_to_num(scores.float(), nan=lowest, neginf=lowest)
    if protected is not None:
        ranked = ranked.masked_fill(protected, float("inf"))  # all other scores are finite here
    ranked = ranked.masked_fill(~vision, float("-inf"))
    rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept = valid & (~vision | (rank < keep[:, None]))

    # Sort by group (dropped, padding, kept) and within each group by position.
    group = torch.where(kept, 2, torch.where(valid, 0, 1))
    index = (group * length + position).argsort(dim=1)[:, length - width :]
    return index, kept.gather(1, index)


def gather_positions(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather ``index`` (``[batch, width]``) along dimension ``dim`` of ``tensor``.

    The dimension before ``dim`` is the batch. If its size is 1 (a table shared by all rows), it is expanded. Other
    dimensions are not indexed.
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
    """`gather_positions` of whole feature vectors, several times faster than an element-wise gather."""
    batch, width = index.shape
    if tensor.shape[0] == 1:
        rows = tensor[0]
    else:
        rows = tensor.flatten(0, 1)
        index = index + tensor.shape[1] * torch.arange(batch, device=index.device)[:, None]
    return rows.index_select(0, index.flatten()).view(batch, width, *tensor.shape[2:])
