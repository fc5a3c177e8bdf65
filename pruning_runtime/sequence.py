"""Which original positions each layer holds: the state that stays with the prompt's cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pruning_runtime.errors import PruningError


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
        return self._each(lambda tensor: tensor.to(device))

    def rows(self, chosen: Tensor) -> Segment:
        """The segment of other rows: ``chosen`` are row numbers in any order and number, or a mask of rows."""
        chosen = torch.as_tensor(chosen, device=self.index.device)
        return self._each(lambda tensor: tensor[chosen])

    def without_last(self, count: int) -> Segment:
        """The segment without its last ``count`` slots."""
        return self._each(lambda tensor: tensor[:, : tensor.shape[1] - count])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Segment:
        sizes = None if self.sizes is None else change(self.sizes)
        return Segment(change(self.index), change(self.valid), self.padded, sizes)


@dataclass
class PrunedPrompt:
    """The segments of one prompt (a batch of rows), in the order of the layers.

    Attributes:
        length: unpruned length.
        segments: the first is the whole prompt; each stage appends one.
        segment_of_layer: index into ``segments`` of each layer that has run.
        has_vision: whether any row has vision tokens.
        later_turns: several tokens were added at once after the prompt, so some of them may be padding.
    """

    length: int
    segments: list[Segment]
    segment_of_layer: dict[int, int] = field(default_factory=dict)
    has_vision: bool = True
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

    def dropped_before(self, layer: int) -> int:
        """Slots of the prompt that ``layer`` does not hold; 0 where it has not run."""
        number = self.segment_of_layer.get(layer, 0)
        return self.length - self.segments[number].width

    def choose_rows(self, chosen: Tensor) -> None:
        """Go on with other rows, as the cache does; ``chosen`` are row numbers."""
        self._replace([segment.rows(chosen) for segment in self.segments])

    def remove_last(self, count: int) -> None:
        """Forget the last ``count`` positions, which the cache no longer holds.

        Raises:
            PruningError: a layer's last slots are other positions, because some were dropped.
        """
        last = torch.arange(self.length - count, self.length)
        for segment in self.segments:
            held = segment.index[:, -count:].cpu()
            if held.shape[1] < count or not bool((held == last).all()):
                raise PruningError(
                    f"the cache was cropped by {count} positions of the pruned prompt, and some of them were dropped from "
                    "it; crop less, or run the prompt again with a new cache"
                )
        self.length -= count
        self._replace([segment.without_last(count) for segment in self.segments])

    def _replace(self, segments: list[Segment]) -> None:
        self.segments = segments
        self._copies.clear()

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
