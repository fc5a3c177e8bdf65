"""Pad prompts to static lengths, and cut the results back."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning_runtime.selection import StagePlan
from pruning_runtime.sequence import Segment


def bucket(count: int) -> int:
    """The static length for ``count`` positions: larger by at most a sixteenth, or by 7 below 256.

    A multiple of 8 below 256, of 16 below 512, and so on: 16 lengths between two powers of two.
    """
    step = max(8, 1 << max(count.bit_length() - 5, 0))
    return -(-count // step) * step


@dataclass(frozen=True)
class Padded:
    """A tensor whose dimensions ``along`` run over the prompt, and the value of padding in front of it."""

    tensor: Tensor
    along: tuple[int, ...]
    fill: bool | float

    def signature(self) -> Hashable:
        """What two calls must have in common to share a buffer: everything except the prompt's length."""
        sizes = tuple(size for dim, size in enumerate(self.tensor.shape) if dim not in self.along)
        return self.tensor.dtype, self.along, sizes

    def buffer(self, width: int) -> Tensor:
        """A new buffer for prompts of at most ``width`` positions."""
        shape = [width if dim in self.along else size for dim, size in enumerate(self.tensor.shape)]
        return torch.full(shape, self.fill, dtype=self.tensor.dtype, device=self.tensor.device)

    def write(self, buffer: Tensor) -> None:
        """Copy the tensor to the end of ``buffer`` and fill the rest."""
        inner = buffer
        for dim in self.along:
            pad = buffer.shape[dim] - self.tensor.shape[dim]
            buffer.narrow(dim, 0, pad).fill_(self.fill)
            inner = inner.narrow(dim, pad, self.tensor.shape[dim])
        inner.copy_(self.tensor)


def plain_segment(segment: Segment, stage: StagePlan, pad: int, length: int) -> Segment:
    """Cut a static segment to its stage's width, in positions of the prompt without its ``pad`` padding."""
    index, valid = segment.index[:, -stage.width :], segment.valid[:, -stage.width :].clone()
    sizes = None if segment.sizes is None else segment.sizes[:, -stage.width :].clone()
    if not stage.padded:
        return Segment(index - pad, valid, False, sizes)
    # A padding slot may hold a position that the prompt does not have; any dropped position of it replaces that.
    kept = torch.zeros(len(index), pad + length, dtype=torch.bool, device=index.device)
    kept = kept.scatter_(1, segment.index, segment.valid)[:, pad:]
    position = torch.arange(length, device=index.device)
    index = (kept * length + position).argsort(dim=1)[:, -stage.width :]
    return Segment(index, valid, True, sizes)
