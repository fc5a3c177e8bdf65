"""Greedy maximum coverage: how much each token would add to the cover of all rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

READS_ARE_FREE = ("cpu",)
"""Devices on which reading a tensor's value does not wait for anything."""
_NEAR, _NEAR_ZERO = 1e-5, 1e-12
"""Gains this close to the largest, as a share of it and of the largest at the start, are summed again. The sums of
thousands of float32 numbers differ by less."""


class Coverage:
    """The cover of rows by chosen tokens, and the gain of every token. Starts at 0.

    A token ``j`` covers row ``r`` as far as ``shares[j, r]``, and a row is covered as far as the best chosen token. The
    gain of a token is what it would add to the cover of all rows, times its weight.

    Where arithmetic is slow and reading a value is free, on a CPU, a choice updates gains by the rows that it covers
    better, which soon are few, and only gains near the largest are summed anew. The choices are those of sums over all
    rows, ties included. On other devices all rows are summed in every step, since the number of changed rows would have
    to be read.

    Args:
        shares: ``[groups, tokens, rows]``, float32.
        weight: ``[groups, tokens]``; None: 1.
    """

    def __init__(self, shares: Tensor, weight: Tensor | None = None) -> None:
        self._shares = shares
        self._weight = shares.new_ones(shares.shape[:2]) if weight is None else weight
        self._covered = shares.new_zeros(len(shares), shares.shape[2])
        free = shares.device.type in READS_ARE_FREE
        self._updates = [_Updates(group) for group in shares] if free else None

    def gains(self) -> Tensor:
        """What choosing each token would add now, ``[groups, tokens]``."""
        if self._updates is None:
            return (self._shares - self._covered[:, None]).clamp_(min=0).sum(2) * self._weight
        import torch

        parts = zip(self._updates, self._shares, self._covered, self._weight, strict=True)
        return torch.stack([update.gains(*tensors) for update, *tensors in parts])

    def choose(self, slot: Tensor) -> None:
        """Add the chosen token of each group, ``[groups, 1]``, to the cover."""
        row = self._shares.gather(1, slot[..., None].expand(-1, 1, self._shares.shape[2])).squeeze(1)
        covered = self._covered.maximum(row)
        for update, old, new in zip(self._updates or (), self._covered, covered, strict=bool(self._updates)):
            update.cover(old, new)
        self._covered = covered


class _Updates:
    """Gains of one group without weights, updated choice by choice in float64, which keeps them near the sums."""

    def __init__(self, shares: Tensor) -> None:
        self._by_row = shares.T.contiguous()  # changed rows are then contiguous
        self._sums = shares.clamp(min=0).double().sum(1)
        self._first = float(self._sums.max()) if len(self._sums) else 0.0

    def cover(self, old: Tensor, new: Tensor) -> None:
        """Subtract what tokens no longer add to rows whose cover rose from ``old`` to ``new``, ``[rows]``."""
        changed = (new > old).nonzero().squeeze(1)
        if not len(changed):
            return
        low, high = old[changed, None].double(), new[changed, None].double()
        # The part of each share between the old cover and the new one.
        self._sums -= (self._by_row[changed].double().clamp_(low, high) - low).sum(0)

    def gains(self, shares: Tensor, covered: Tensor, weight: Tensor) -> Tensor:
        """Float64 ``[tokens]``; near the largest the exact sums over all rows."""
        found = self._sums * weight
        largest = float(found.max()) if len(found) else 0.0
        scale = self._first * float(weight.abs().max()) if len(found) else 0.0
        near = (found >= largest - _NEAR * largest - _NEAR_ZERO * scale).nonzero().squeeze(1)
        found[near] = ((shares[near] - covered).clamp_(min=0).sum(1) * weight[near]).double()
        return found
