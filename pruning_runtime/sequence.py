"""Which tokens of a prompt each layer keeps: the state that travels with the prompt's cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class PruningError(RuntimeError):
    """A call that a pruned model cannot serve rightly; the message says what to do instead."""


@dataclass(frozen=True)
class Segment:
    """The sequence that a run of consecutive layers sees.

    ``index`` (``[batch, width]``) holds the original position of each place, ``valid`` whether it is a
    real token. ``filled``: some place is not, in some row. ``weights``: how many tokens each place stands for,
    float32 ``[batch, width]``; None: each for itself.
    """

    index: Tensor
    valid: Tensor
    filled: bool
    weights: Tensor | None = None

    @property
    def width(self) -> int:
        """Places per row."""
        return self.index.shape[1]

    def to(self, device: torch.device) -> Segment:
        """The same segment on another device; itself where it already is there."""
        if self.index.device == device:
            return self
        weights = None if self.weights is None else self.weights.to(device)
        return Segment(self.index.to(device), self.valid.to(device), self.filled, weights)


@dataclass
class PrunedPrompt:
    """The segments of one prompt (a batch of rows), in the order in which layers reach them.

    ``length`` is the unpruned length. ``later_turns``: several tokens were added at once after the
    prompt, so tokens behind it may be padding.
    """

    length: int
    segments: list[Segment]
    segment_of_layer: dict[int, int] = field(default_factory=dict)
    later_turns: bool = False
    _copies: dict[tuple[int, torch.device], Segment] = field(default_factory=dict, repr=False)

    def of(self, layer: int, device: torch.device) -> Segment:
        """What decoder layer ``layer`` saw of the prompt; the same object for all layers with one segment."""
        number = self.segment_of_layer[layer]
        segment = self.segments[number]
        if segment.index.device == device:
            return segment
        if (number, device) not in self._copies:
            self._copies[number, device] = segment.to(device)
        return self._copies[number, device]

    def first(self, device: torch.device) -> Tensor:
        """Where each row begins after padding on its left, ``[batch, 1]``."""
        valid = self.segments[0].to(device).valid
        return (valid.cumsum(1) == 0).sum(1, keepdim=True)

    def still_there(self, segment: Segment, later: Segment) -> Tensor:
        """Which places of ``segment`` are real and still part of ``later``, bool ``[batch, width]``."""
        if later is segment:
            return segment.valid
        present = torch.zeros(len(later.index), self.length, dtype=torch.bool, device=later.index.device)
        present.scatter_(1, later.index, later.valid)
        return segment.valid & present.gather(1, segment.index)


def once(made: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """``make()``, once for all layers that share ``made``."""
    if key not in made:
        made[key] = make()
    return made[key]


def restore_length(output: Any, prompt: PrunedPrompt) -> Any:
    """Put a decoder's last hidden states back to their original places, zeros where dropped.

    States of the last tokens only, where the model itself went on with no others, are left as they are.
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
