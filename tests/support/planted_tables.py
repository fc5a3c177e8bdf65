"""Sensitivity tables of a backbone whose layers' needs are given."""

from __future__ import annotations

import numpy as np

from schedule_finder.measuring.answer_kl import TokenPolicy
from schedule_finder.measuring.sensitivity_table import RATIOS, SensitivityTable
from schedule_finder.solvers import BudgetTarget
from tests.support.solver_profiles import shape_of

LAYERS = 10
POLICY = TokenPolicy("text_guided", "merge")
UNIT = 0.02
"""Answer change of one unit of need, so that whole decoders stay below 1."""


def table_from(
    need: np.ndarray, samples: int = 8, noise: float = 0.0, seed: int = 0, earliest: int = 0
) -> SensitivityTable:
    """A table of a backbone in which layer ``k`` loses ``UNIT * need[k] * (1 - ratio)``, whatever the others see.

    ``earliest``: -1 where a stage before the decoder was measured too.
    """
    layers = range(earliest, len(need) - 1)
    behind = np.array([need[layer + 1 :].sum() for layer in layers])
    mean = behind[:, None] * (1 - np.array(RATIOS))
    rng = np.random.default_rng(seed)
    values = mean[..., None] * (1 + noise * rng.standard_normal((*mean.shape, samples)))
    return SensitivityTable(
        POLICY,
        tuple(layers),
        RATIOS,
        tuple(f"{i}" for i in range(samples)),
        -np.log1p(-np.minimum(UNIT * np.abs(values), 0.999)),
    )


def target_of(budget: float) -> BudgetTarget:
    """A budget of processed tokens for the backbone of `table_from`."""
    return BudgetTarget("processed", budget, shape_of(LAYERS), 100, 20)
