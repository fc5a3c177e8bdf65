"""Which original positions each layer holds: the state that stays with the prompt's cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """The sequence that consecutive layers between two stages compute.

    Attributes:
        index: original position of each slot, ``[batch, width]``.
        valid: False at padding slots, ``[batch, width]``.
        padded: whether any slot of any row is padding (known on the host).
        sizes: token sizes, the number of original tokens merged into each slot, float32 ``[batch, width]``;
            None: 1 everywhere.
    """

    index: Tensor
    valid: Tensor
    padded: bool
    sizes: Tensor | None = None

    @property
    def width(self) -> int:
        """Slots per row."""
        return self.index.shape[1]

    def to(self, device: torch.device) -> Segment:
        """The segment on ``device``; the same object if it is there already."""
        if self.index.device == device:
            return self
        sizes = None if self.sizes is None else self.sizes.to(device)
        return Segment(self.index.to(device), self.valid.to(device), self.padded, sizes)


@dataclass
class PrunedPrompt:
    """The segments of one prompt (a batch of rows), in the order of the layers.

    Attributes:
        length: unpruned length.
        segments: the first is the whole prompt; each stage appends one.
        segment_of_layer: index into ``segments`` of each layer that has run.
        later_turns: several tokens were added at once after the prompt, so some of them may be padding.
    """

    length: int
    segments: list[Segment]
    segment_of_layer: dict[int, int] = field(default_factory=dict)
    later_turns: bool = False
    _copies: dict[tuple[int, torch.device], Segment] = field(default_factory=dict, repr=False)

    def of(self, layer: int, device: torch.device) -> Segment:
        """The segment that decoder layer ``layer`` computed; layers with one segment get the same object."""
        number = self.segment_of_layer[layer]
        segment = self.segments[number]
        if segment.index.device == device:
            return segment
        if (number, device) not in self._copies:
            self._copies[number, device] = segment.to(device)
        return self._copies[number, device]

    def first(self, device: torch.device) -> Tensor:
        """Position of the first token of each row after left padding, ``[batch, 1]``."""
        valid = self.segments[0].to(device).valid
        return (valid.cumsum(1) == 0).sum(1, keepdim=True)

    def remaining(self, segment: Segment, later: Segment) -> Tensor:
        """Slots of ``segment`` that are valid and whose token is also in ``later``, bool ``[batch, width]``."""
        if later is segment:
            return segment.valid
        present = torch.zeros(len(later.index), self.length, dtype=torch.bool, device=later.index.device)
        present.scatter_(1, later.index, later.valid)
        return segment.valid & present.gather(1, segment.index)


def once(results: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """``results[key]``; computed with ``make()`` the first time. Layers that share a segment share results."""
    if key not in results:
        results[key] = make()
    return results[key]


def restore_length(output: Any, prompt: PrunedPrompt) -> Any:
    """Scatter a decoder's last hidden states to their original positions, with zeros at dropped tokens.

    Returns ``output`` unchanged where the model itself kept the last tokens only.
    """
    hidden: Tensor = output[0]
    last = prompt.segments[-1].to(hidden.device)
    if hidden.shape[1] != last.width:
        return output
    kept = hidden.masked_fill(~last.valid[..., None], 0)
    restored = hidden.new_zeros(hidden.shape[0], prompt.length, hidden.shape[2])
    restored.scatter_(1, last.index[..., None].expand_as(kept), kept)
    if isinstance(output, tuple):
        return (restored, *output[1:])
    output.last_hidden_state = restored
    return output
