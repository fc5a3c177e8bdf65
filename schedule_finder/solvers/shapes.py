"""Published schedules, changed as little as possible to meet another budget; and random schedules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pruning_runtime.schedule import Stage
from schedule_finder.solvers.budget import BudgetTarget

_STEPS = 60


def scaled_to_budget(
    depths: Sequence[float], ratios: Sequence[float], budget: BudgetTarget
) -> tuple[Stage, ...]:
    """Stages of a published shape that spend the budget.

    The ratios are raised to one common power: 1 stays 1, their order and proportion in logarithms remain. Where
    even dropping everything at these layers costs too much, all layers first move towards the first by one factor.

    Each layer then moves to the next earlier one that can score tokens, or to the first.

    Args:
        depths: share of the layers that have run when tokens leave, rising.
        ratios: kept after each, falling, in (0, 1).
        budget: what the stages may cost. Raises `InputError` where no stages can meet it.
    """
    deepest = budget.deepest_layer()
    depth, usable = budget.shape.num_layers, budget.stage_layers()
    layers = _distinct([min(round(share * depth) - 1, depth - 2) for share in depths], usable)
    if layers[0] > deepest:
        shrink = (deepest + 1) / (layers[0] + 1)
        layers = _distinct([int((layer + 1) * shrink) - 1 for layer in layers], usable)
        while layers[0] > usable[0] and budget.cost(_stages(layers, [0.0] * len(layers))) > budget.target:
            layers = _distinct([layer - 1 for layer in layers], usable)
    return raised_to_budget(layers, ratios[: len(layers)], budget)


def raised_to_budget(
    layers: Sequence[int], ratios: Sequence[float], budget: BudgetTarget
) -> tuple[Stage, ...]:
    """Stages at these layers with all ratios raised to the one power that spends the budget."""
    low, high = 0.0, 1e4  # exponents: 0 keeps everything, the other nothing, of a ratio of 0.99 as well
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if budget.cost(_stages(layers, [ratio**middle for ratio in ratios])) > budget.target:
            low = middle
        else:
            high = middle
    powers = [ratio**high for ratio in ratios]
    # The last ratio spends what bisection leaves.
    return budget.spend_rest(layers, powers[:-1]) or _stages(layers, powers)


def random_stages(
    budget: BudgetTarget, rng: np.random.Generator, earliest: int, most: int = 3
) -> tuple[Stage, ...]:
    """Control: one to ``most`` layers, from ``earliest`` on, and ratios drawn at random that spend the budget."""
    budget.deepest_layer(earliest)  # refuses what no stages can meet
    while True:
        usable = budget.stage_layers(earliest)
        number = int(rng.integers(1, min(most, len(usable)) + 1))
        layers = sorted(rng.choice(usable, number, replace=False).tolist())
        ratios = sorted(rng.uniform(0, 1, number - 1).tolist(), reverse=True)
        if (stages := budget.spend_rest(layers, ratios)) is not None:
            return stages


def _stages(layers: Sequence[int], ratios: Sequence[float]) -> tuple[Stage, ...]:
    return tuple(Stage(layer=layer, keep_ratio=ratio) for layer, ratio in zip(layers, ratios, strict=True))


def _distinct(layers: Sequence[int], usable: Sequence[int]) -> list[int]:
    """Each layer as the last of ``usable`` up to it, or the first; of stages that fall together one is left."""
    return sorted({max((known for known in usable if known <= layer), default=usable[0]) for layer in layers})
