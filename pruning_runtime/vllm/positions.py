"""Original positions of kept tokens: as columns behind the embeddings, and back to rows of a prompt. Pure tensor functions.

vLLM caches the embeddings of an image by its content, and knows the prompt later. So every kept token carries its
position inside its image in further columns. Two columns hold one number, because bfloat16 counts exactly to 256 only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_DIGIT = 256
LARGEST = _DIGIT * _DIGIT - 1
"""The largest number that two columns hold."""


def with_numbers(features: Tensor, numbers: Tensor) -> Tensor:
    """``features`` (``[tokens, width]``) with two more columns for each of ``numbers`` (long ``[tokens, count]``)."""
    digits = torch.stack([numbers // _DIGIT, numbers % _DIGIT], dim=2).flatten(1)
    return torch.cat([features, digits.to(features.dtype)], dim=1)


def split_numbers(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The inverse of `with_numbers`: the features, and long ``[tokens, count]``."""
    digits = features[:, features.shape[1] - 2 * count :].long().view(len(features), count, 2)
    return features[:, : features.shape[1] - 2 * count], digits[..., 0] * _DIGIT + digits[..., 1]


def computed_slots(ids: Tensor, vision_ids: Sequence[int], first: int, count: int) -> Tensor:
    """Slots of the next ``count`` vision tokens of a prompt from slot ``first`` on, long ``[count]``.

    ``ids``: token ids of the prompt, ``[length]``; ``vision_ids``: those of vision tokens.
    """
    slots = _is_vision(ids, vision_ids).nonzero()[:, 0]
    return slots[slots >= first][:count]


def position_before(ids: Tensor, vision_ids: Sequence[int], positions: Tensor, slots: Tensor) -> Tensor:
    """Position of the last text token before each of ``slots``; -1 where there is none. Long ``[slots]``.

    ``positions``: of all tokens of the prompt, ``[length]``.
    """
    vision = _is_vision(ids, vision_ids)
    number = torch.arange(len(ids), device=ids.device)
    before = torch.where(vision, -1, number).cummax(0).values[slots]
    return torch.where(before < 0, -1, positions[before.clamp(min=0)])


def grid_positions(frames: int, rows: int, columns: int, frame_step: float) -> Tensor:
    """Time, row and column of every token of an image or video from its first position on, long ``[tokens, 3]``.

    ``frame_step``: distance of two frames in positions; times are rounded down.
    """
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).view(-1, 3)
    if frame_step != 1.0:
        grid[:, 0] = (grid[:, 0].double() * frame_step).long()
    return grid


def _is_vision(ids: Tensor, vision_ids: Sequence[int]) -> Tensor:
    found = torch.zeros_like(ids, dtype=torch.bool)
    for vision_id in vision_ids:
        found |= ids == vision_id
    return found
