"""Exact allocation by dynamic programming, for a loss and a cost that both add up over layers."""

from __future__ import annotations

import math

import numpy as np

from pruning_runtime.schedule import Stage
from schedule_finder.solvers.budget import BudgetTarget

COST_STEPS = 400
"""Resolution of the budget in the dynamic program; the last ratio spends what rounding leaves."""


def allocate(
    loss: np.ndarray, ratios: np.ndarray, budget: BudgetTarget, most_stages: int
) -> dict[int, tuple[float, tuple[Stage, ...]]]:
    """The stages of least total loss within the budget, for every number of stages that can meet it.

    Exact up to the resolution of the budget (`COST_STEPS`) and of the grid of ratios.

    Args:
        loss: ``[num_layers, ratios]``, loss of a layer that computes that share of the vision tokens; adds up
            over layers. Infinite where a ratio is impossible, as in the first layer when nothing can be dropped
            before it.
        ratios: falling from 1 to 0.
        budget: what the layers may cost together.
        most_stages: how many stages to try.

    Returns:
        number of stages -> (loss, stages); numbers that no schedule can have within the budget are missing.
    """
    layers, grid = loss.shape
    may_drop = {stage + 1 for stage in budget.stage_layers(-1)}
    steps = _cost_steps(budget, ratios)
    # best[s, r, c]: least loss of the layers so far with s stages, now at ratio r, having cost at most c.
    best = np.full((most_stages + 1, grid, COST_STEPS + 1), np.inf)
    best[0, 0] = 0.0  # all tokens enter the decoder
    came_from = np.zeros((layers, *best.shape), dtype=np.int16)
    for layer in range(layers):
        arrived = best.copy()
        origin = np.broadcast_to(np.arange(grid)[None, :, None], best.shape).copy()
        for after in range(1, grid if layer in may_drop else 1):
            before = best[:-1, :after].argmin(1)
            value = np.take_along_axis(best[:-1, :after], before[:, None], 1)[:, 0]
            better = value < arrived[1:, after]
            arrived[1:, after][better] = value[better]
            origin[1:, after][better] = before[better]
        for ratio in range(grid):
            step = steps[layer, ratio]
            best[:, ratio] = np.inf
            if step <= COST_STEPS:
                best[:, ratio, step:] = arrived[:, ratio, : COST_STEPS + 1 - step] + loss[layer, ratio]
        came_from[layer] = origin
    found = {}
    for number in range(1, most_stages + 1):
        # What the stages themselves take is not the layers' to spend.
        left = COST_STEPS - math.ceil(number * budget.stage_cost / budget.target * COST_STEPS)
        if left < 0:
            break
        last = int(best[number, :, left].argmin())
        if np.isfinite(best[number, last, left]):
            path = _path(came_from, steps, number, last, left)
            stages = _spend(budget, path, ratios)
            if stages is not None:
                found[number] = float(best[number, last, left]), stages
    return found


def _cost_steps(budget: BudgetTarget, ratios: np.ndarray) -> np.ndarray:
    """Cost of each layer at each ratio in whole steps, the budget being `COST_STEPS` of them."""
    costs = budget.layer_costs(ratios) / budget.target * COST_STEPS
    # A rounding error per layer would add up over many layers at one ratio; of the running sum it does not.
    running = np.round(np.cumsum(costs, axis=0) + 1e-9)
    return np.diff(running, axis=0, prepend=0).astype(int)


def _path(came_from: np.ndarray, steps: np.ndarray, number: int, last: int, cost: int) -> list[int]:
    """Index into the ratio grid before the decoder and in every layer, followed back from ``cost`` at the last layer."""
    path = [last]
    for layer in range(len(came_from) - 1, -1, -1):
        cost -= steps[layer, last]
        before = int(came_from[layer, number, last, cost])
        number -= before != last
        last = before
        path.append(last)
    return path[::-1]


def _spend(budget: BudgetTarget, path: list[int], ratios: np.ndarray) -> tuple[Stage, ...] | None:
    """Stages of a path, with its last ratio moved to spend the budget exactly."""
    changes = [index for index in range(1, len(path)) if path[index] != path[index - 1]]
    layers = [index - 2 for index in changes]
    kept = [float(ratios[path[index]]) for index in changes]
    stages = budget.spend_rest(layers, kept[:-1])
    if stages is not None:
        return stages
    # Even the ratio before may be too high or too low by a rounding step: keep the path as it is if it fits.
    as_found = tuple(Stage(layer=layer, keep_ratio=ratio) for layer, ratio in zip(layers, kept, strict=True))
    return as_found if budget.cost(as_found) <= budget.target * (1 + 1 / COST_STEPS) else None
