"""Vision tokens of a stage as dense groups, for rules that compare tokens with each other. Does not synchronize."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


def image_numbers(vision: Tensor) -> Tensor:
    """Number of the image that each vision token belongs to, from 0 in each row, ``[batch, length]``.

    An image is a run of vision tokens. A single other token inside a run marks the end of a row of patches (Pixtral's
    break tokens) and does not end the image. Values at other tokens have no meaning.

    Args:
        vision: bool ``[batch, length]``.
    """
    before = torch.nn.functional.pad(vision, (2, 0))
    starts = vision & ~before[:, 1:-1] & ~before[:, :-2]
    return (starts.cumsum(1) - 1).clamp(min=0)


def image_counts(vision: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images of each row, and the vision tokens of its largest image, both ``[batch]``.

    Args:
        vision: bool ``[batch, length]``.
        images: result of `image_numbers`.
    """
    number = torch.where(vision.any(1), images.masked_fill(~vision, 0).amax(1) + 1, 0)
    sizes = torch.zeros_like(images).scatter_add_(1, images, vision.long())
    return number, sizes.amax(1)


class FrameProblem(IntEnum):
    """Why the vision tokens of a row are no frames; see `frame_problems`."""

    NONE = 0
    UNEQUAL = 1
    TOO_FEW = 2


def frame_problems(
    vision: Tensor, images: Tensor, frame_tokens: int | None, fewest: int, newlines: bool
) -> Tensor:
    """`FrameProblem` of each row, long ``[batch]``; rows without a vision token have none.

    Args:
        vision: bool ``[batch, length]``.
        images: result of `image_numbers`.
        frame_tokens: tokens of a frame; every image is then a video. None: every image is a frame of one video.
        fewest: frames of a video.
        newlines: a video may end with an image-newline token, which is in no frame.
    """
    sizes = torch.zeros_like(images).scatter_add_(1, images, vision.long())
    is_image = sizes > 0
    if frame_tokens is None:
        frames = is_image.sum(1, keepdim=True)
        unequal = sizes != sizes.amax(1, keepdim=True)
    else:
        frames = sizes // frame_tokens
        unequal = sizes % frame_tokens > int(newlines and frame_tokens > 1)
    problem = torch.where(frames < fewest, int(FrameProblem.TOO_FEW), int(FrameProblem.NONE))
    problem = torch.where(unequal, int(FrameProblem.UNEQUAL), problem)
    problem = problem.masked_fill(~is_image, int(FrameProblem.NONE))
    # A row with both shows the sizes first.
    first = (problem == FrameProblem.UNEQUAL).any(1)
    return torch.where(first, int(FrameProblem.UNEQUAL), problem.amax(1))


@dataclass(frozen=True, slots=True)
class TokenGroups:
    """Where the vision tokens of each group stand in the sequence.

    Attributes:
        index: slot in the sequence, ``[batch, groups, slots]``; 0 at padding.
        is_token: False at padding, ``[batch, groups, slots]``; tokens come first, in order.
        keep: tokens that each group keeps, long ``[batch, groups]``.
    """

    index: Tensor
    is_token: Tensor
    keep: Tensor

    @classmethod
    def of(cls, vision: Tensor, group: Tensor, keep: Tensor, num_groups: int, slots: int) -> TokenGroups:
        """Collect the vision tokens of a stage.

        Args:
            vision: bool ``[batch, length]``.
            group: number of each vision token's group, long ``[batch, length]``.
            keep: vision tokens to keep in each row, long ``[batch]``.
            num_groups: of each row, at least the highest number of a group plus 1.
            slots: at least the tokens of the largest group.
        """
        batch, length = vision.shape
        # Tokens sort by group, and inside a group by position.
        order = torch.where(vision, group, num_groups).argsort(dim=1, stable=True)
        sorted_group = torch.where(vision, group, num_groups).gather(1, order)
        sizes = torch.zeros(batch, num_groups + 1, dtype=torch.long, device=vision.device)
        sizes.scatter_add_(1, sorted_group, torch.ones_like(sorted_group))
        first = sizes.cumsum(1) - sizes
        rank = torch.arange(length, device=vision.device) - first.gather(1, sorted_group)
        # Slot -1 of the last group takes everything that is not a vision token.
        place = torch.where(sorted_group < num_groups, sorted_group * slots + rank, num_groups * slots)
        index = torch.zeros(batch, num_groups * slots + 1, dtype=torch.long, device=vision.device)
        index = index.scatter_(1, place, order)[:, :-1].view(batch, num_groups, slots)
        sizes = sizes[:, :-1]
        is_token = torch.arange(slots, device=vision.device) < sizes[..., None]
        return cls(index.where(is_token, 0), is_token, proportional_shares(keep, sizes))

    def gather(self, values: Tensor) -> Tensor:
        """``values`` (``[batch, length, ...]``) at the groups' tokens, ``[batch * groups, slots, ...]``; 0 at padding."""
        batch, groups, slots = self.index.shape
        flat = self.index.view(batch, groups * slots)
        flat = flat.view(*flat.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
        found = values.gather(1, flat).view(batch * groups, slots, *values.shape[2:])
        real = self.is_token.view(batch * groups, slots, *[1] * (values.dim() - 2))
        return found.masked_fill(~real, 0)

    def scatter(self, values: Tensor, length: int, fill: float) -> Tensor:
        """The inverse of `gather`: ``[batch * groups, slots]`` back to ``[batch, length]``, ``fill`` elsewhere."""
        batch, groups, slots = self.index.shape
        flat = torch.where(self.is_token, self.index, length).view(batch, groups * slots)
        found = values.new_full((batch, length + 1), fill)
        return found.scatter_(1, flat, values.view(batch, groups * slots))[:, :-1]

    def put(self, states: Tensor, features: Tensor, where: Tensor) -> Tensor:
        """``states`` (``[batch, length, width]``) with ``features`` at the groups' tokens that ``where`` marks.

        ``features`` is ``[batch * groups, slots, width]``, ``where`` bool ``[batch * groups, slots]``.
        """
        batch, groups, slots = self.index.shape
        length, width = states.shape[1:]
        flat = torch.where(where.view(self.index.shape) & self.is_token, self.index, length)
        flat = flat.view(batch, groups * slots, 1).expand(-1, -1, width)
        longer = torch.nn.functional.pad(states, (0, 0, 0, 1))
        return longer.scatter(1, flat, features.view(batch, groups * slots, width))[:, :-1]


def proportional_shares(total: Tensor, sizes: Tensor) -> Tensor:
    """``total`` (``[batch]``) in proportion to ``sizes`` (``[batch, groups]``), as whole numbers of exactly that sum.

    By largest remainders; ties go to the first group. A group gets no more than its size as long as ``total`` is at
    most the sum of the sizes.
    """
    every = sizes.sum(1, keepdim=True).clamp(min=1)
    share, remainder = total[:, None] * sizes // every, total[:, None] * sizes % every
    left = (total - share.sum(1))[:, None].clamp(min=0)
    rank = remainder.argsort(dim=1, descending=True, stable=True).argsort(1)
    return share + ((rank < left) & (remainder > 0)).long()
