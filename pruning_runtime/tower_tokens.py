"""Statistics of the vision tower for the tokens of a stage."""

from __future__ import annotations

from torch import Tensor

from pruning_runtime.scorers import TowerTokens
from pruning_runtime.tower import TowerStatistics


def pick_tower_tokens(statistics: TowerStatistics, number: Tensor, is_token: Tensor) -> TowerTokens:
    """What the tower says of some vision tokens; 0 where no patch makes them.

    Args:
        statistics: of all vision tokens of a prompt.
        number: of each token among them, long ``[groups, slots]``.
        is_token: False at padding, ``[groups, slots]``.
    """
    has_patch = is_token & (statistics.image[number] >= 0)

    def of(values: Tensor) -> Tensor:
        found = values[number]
        return found.masked_fill(~has_patch.view(*has_patch.shape, *[1] * (found.dim() - 2)), 0)

    return TowerTokens(
        saliency={name: of(values) for name, values in statistics.saliency.items()},
        has_patch=has_patch,
        states=None if statistics.states is None else of(statistics.states),
        keys=None if statistics.keys is None else of(statistics.keys),
        row=of(statistics.row),
        column=of(statistics.column),
        rows=of(statistics.rows),
        columns=of(statistics.columns),
        image=of(statistics.image),
        has_cls=statistics.has_cls,
    )
