"""How many forward passes a search needs, before it begins. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence

from schedule_finder.measuring.sensitivity_table import PROBED_DEPTHS, RATIOS
from schedule_finder.search import CHOICE_SAMPLES, TABLE_SAMPLES
from schedule_finder.solvers import SOLVERS
from schedule_finder.solvers.sensitivity import MAX_STAGES, MOST_CANDIDATES, REFINEMENTS

_POLICIES = 4
"""Alternatives measured on the chosen stages: the scorers of a profile, and the other dropped-token setting."""
_NEIGHBOURS = 2 * MAX_STAGES + 2 * (MAX_STAGES - 1) + MAX_STAGES
"""Most neighbours of a schedule: a layer earlier or later, a ratio up or down, a stage less."""


def search_forwards(
    solver: str,
    layers: Sequence[int],
    depth: int,
    samples: int,
    *,
    vision_share: float,
    budget: float | None = None,
) -> float | None:
    """Upper bound on the unpruned forward passes of one sample that a solver needs.

    Args:
        solver: its name.
        layers: layers of single stages that are measured; see `measured_layers`.
        depth: decoder layers.
        samples: calibration samples.
        vision_share: share of a typical prompt's tokens that are vision tokens.
        budget: of the whole schedules, in vision tokens processed; None: not known, they count as unpruned.

    Returns:
        None where it is not known before the search: ``grid`` measures all schedules that spend the budget.
    """
    if not SOLVERS[solver].measures:
        return 0.0
    if not SOLVERS[solver].needs_sensitivity:
        return None
    small = samples < TABLE_SAMPLES + CHOICE_SAMPLES
    table = min(TABLE_SAMPLES, max(1, samples // 2)) if small else TABLE_SAMPLES
    choice = min(CHOICE_SAMPLES, max(1, samples - table)) if small else CHOICE_SAMPLES

    def cost(ratio: float) -> float:
        """Of a layer that computes this share of the vision tokens, over an unpruned one."""
        return 1 - vision_share * (1 - ratio)

    # A single stage starts from stored states at its own layer, which runs whole (or scores before the decoder);
    # later layers run on the kept tokens.
    single = sum(
        (1 + cost(ratio) * (depth - 1 - max(layer, -1))) / depth for layer in layers for ratio in RATIOS
    )
    probes = 2 * len(PROBED_DEPTHS)
    whole = MOST_CANDIDATES + REFINEMENTS * _NEIGHBOURS + _POLICIES
    return table * (2 + probes + single) + choice * (1 + whole * (1 if budget is None else cost(budget)))
