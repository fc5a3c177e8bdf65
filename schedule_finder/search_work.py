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


def search_forwards(solver: str, layers: Sequence[int], depth: int, samples: int) -> float | None:
    """Upper bound on the unpruned forward passes of one sample that a solver needs.

    Args:
        solver: its name.
        layers: layers of single stages that are measured; see `measured_layers`.
        depth: decoder layers.
        samples: calibration samples.

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
    # A single stage starts from stored states at its own layer; later layers run on the kept tokens. Text is part of
    # every layer, so a share of 1 bounds it; the ratio would be too low for short prompts.
    single = sum((depth - max(layer, 0)) / depth for layer in layers) * len(RATIOS)
    probes = 2 * len(PROBED_DEPTHS)
    whole = MOST_CANDIDATES + REFINEMENTS * _NEIGHBOURS + _POLICIES
    return table * (2 + probes + single) + choice * (1 + whole)
