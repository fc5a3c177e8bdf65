"""Resamples of the samples, for the support of what was found.

Stability selection (Meinshausen and Buehlmann 2010): a finding counts if it is found again in most resamples. Half of
the resamples are bootstrap draws, half are halves of random splits, which share no sample with their counterpart.
"""

from __future__ import annotations

import numpy as np

from schedule_finder.intervals import bootstrap_weights


def resample_weights(num_samples: int, number: int, seed: int) -> np.ndarray:
    """How often each sample counts, ``[number, num_samples]``: bootstrap draws, then halves in pairs.

    A single sample has no halves; all draws are then the sample itself.
    """
    draws = bootstrap_weights(num_samples, number - number // 4 * 2, seed)
    if num_samples < 2:
        return np.ones((number, num_samples))
    rng = np.random.default_rng([seed, 1])
    order = rng.random((number // 4, num_samples)).argsort(axis=1)
    first = (order < num_samples // 2).astype(float)
    return np.concatenate([draws, first, 1 - first])
