"""Confidence intervals: every bootstrap over samples, and the interval of a proportion. Pure NumPy, seeded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Band:
    """Mean over samples and its confidence interval, each an array over layers (or gaps)."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: float


def band(values: np.ndarray, level: float = 0.95, seed: int = 0, resamples: int = 1000) -> Band:
    """Mean over samples with a percentile bootstrap interval, resampling whole samples.

    Args:
        values: ``[num_samples, num_points]``; NaN entries are left out of that point's mean.
        level: coverage of the interval, in (0, 1).
        seed: draws the resamples.
        resamples: how many.

    The interval is about *samples*: more of them narrow it. It says nothing about another
    backbone.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"values: shape {values.shape}, need [num_samples >= 1, num_points]")
    if not 0 < level < 1:
        raise ValueError(f"level: {level}, need a number between 0 and 1")
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    weights = bootstrap_weights(len(values), resamples, seed)
    with np.errstate(invalid="ignore"):  # a point that no sample knows is NaN
        mean = filled.sum(axis=0) / known.sum(axis=0)
        means = (weights @ filled) / (weights @ known)
        # A resample may hold only samples that do not know a point; it then says nothing about it.
        means = np.where(np.isnan(means), mean, means)
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Band(mean, low, high, level)


def bootstrap_weights(num_samples: int, resamples: int, seed: int) -> np.ndarray:
    """How often each sample is drawn, ``[resamples, num_samples]``; rows sum to ``num_samples``."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_samples, np.full(num_samples, 1 / num_samples), resamples).astype(float)


def mean_interval(
    values: np.ndarray, level: float = 0.95, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over samples.

    For two methods on the same samples, pass their differences: the interval is then paired.

    Args:
        values: ``[num_samples]``, finite.
        level: coverage of the interval, in (0, 1).
        seed: draws the resamples.
        resamples: how many.
    """
    # Samples of equal value are drawn together: many differences of exact matches are -1, 0 or 1.
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), resamples)
    low, high = np.quantile(drawn @ distinct / len(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean difference of two methods on the same samples, ``[samples]``.

    Where no sample differs, resampling would say that none ever does. The interval then ends at the share of samples
    that could differ and be missed: the upper end of Wilson's interval for none of so many.
    """
    if not np.any(differences):
        rarest = wilson_interval(0, len(differences))[1]
        return -rarest, rarest
    return mean_interval(differences)


def rounded_mean(values: np.ndarray) -> float:
    """The mean as evidence shows it, to five decimals."""
    return round(float(values.mean()), 5)


def wilson_interval(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson's score interval); NaN where nothing was counted."""
    if count == 0:
        return math.nan, math.nan
    share = successes / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def score_interval(scores: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean score: Wilson's where every score is 0 or 1, else a bootstrap over samples.

    Args:
        scores: ``[draws, samples]``, at least one of each; draws of a sample are averaged.
    """
    if np.isin(scores, (0, 1)).all():
        return wilson_interval(float(scores.sum()) / len(scores), scores.shape[1])
    return mean_interval(scores.mean(axis=0))


def ratio_interval(values: np.ndarray, reference: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Paired 95 % bootstrap interval of the ratio of two means over the same samples, each ``[num_samples]``.

    NaN where the reference is 0 on every sample.
    """
    weights = bootstrap_weights(len(values), 1000, seed)
    below = weights @ reference
    ratios = (weights @ values)[below > 0] / below[below > 0]
    if not len(ratios):
        return math.nan, math.nan
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
