"""Statistics of the vision tower for the tokens that reach a stage. Does not synchronize."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pruning_runtime.scorers import TowerTokens
from pruning_runtime.token_groups import TokenGroups
from pruning_runtime.tower import TowerStatistics, TowerTap


class PromptTower:
    """What the vision tower says of one prompt.

    Args:
        tap: collects the statistics; read at the first stage that needs them, when the tower has run.
        vision: vision tokens of the prompt, bool ``[batch, length]``.
        counts: vision tokens of each row.
    """

    def __init__(self, tap: TowerTap, vision: Tensor, counts: Sequence[int]) -> None:
        self._tap, self._vision, self._counts = tap, vision, counts
        self._statistics: TowerStatistics | None = None

    def tiles(self, index: Tensor) -> tuple[Tensor, int, int]:
        """Tile of each token that reaches a stage, ``[batch, slots]``, tiles of a row, and tokens of the largest tile.

        ``index``: positions of the slots in the prompt, ``[batch, slots]``. At other slots the tile has no meaning.
        """
        found = self._read(index.device)
        return found.tile[self._numbers(index)], found.num_tiles, found.largest_tile

    def tokens(self, groups: TokenGroups, index: Tensor) -> TowerTokens:
        """What the tower says of ``groups``; 0 where no patch makes a token. ``index``: as of `tiles`."""
        found = self._read(index.device)
        number = groups.gather(self._numbers(index))
        has_patch = groups.is_token.flatten(0, 1) & (found.image[number] >= 0)

        def of(values: Tensor) -> Tensor:
            picked = values[number]
            return picked.masked_fill(~has_patch.view(*has_patch.shape, *[1] * (picked.dim() - 2)), 0)

        return TowerTokens(
            saliency={name: of(values) for name, values in found.saliency.items()},
            has_patch=has_patch,
            states=None if found.states is None else of(found.states),
            keys=None if found.keys is None else of(found.keys),
            row=of(found.row),
            column=of(found.column),
            rows=of(found.rows),
            columns=of(found.columns),
            image=of(found.image),
            has_cls=found.has_cls,
        )

    def _read(self, device: torch.device) -> TowerStatistics:
        if self._statistics is None:
            self._statistics = self._tap.statistics(self._vision.to(device), self._counts)
        return self._statistics

    def _numbers(self, index: Tensor) -> Tensor:
        """Number of the vision token at each slot among those of the batch; any number at other slots."""
        number = (self._vision.flatten().cumsum(0) - 1).clamp(min=0).view(self._vision.shape)
        return number.to(index.device).gather(1, index)
