"""The hard subset: items that the full model answers and the down-sampled image does not.

Many items of the usual benchmarks can be answered from a small image. They say little about a method that drops vision
tokens, and hide differences between methods. VTC-Bench (arXiv 2510.07143) calls the others difficult and reports methods
on them. Here the down-sampled image has as many vision tokens as the schedule computes, so each schedule has a hard
subset of its own.

Items are chosen by the answers of the full model, which is right on all of them. Retention on the subset is therefore
not comparable with retention on all items; compare methods on the subset with each other.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from schedule_finder.intervals import score_interval

RIGHT = 0.5
"""Score from which an item counts as answered, for metrics that give partial scores."""
FEWEST = 10
"""Hard items below which nothing should be concluded."""
HARD_COLUMNS = ("hard_n", "hard_score", "hard_low", "hard_high", "hard_retention")


def hard_items(full: np.ndarray, smaller: np.ndarray) -> np.ndarray:
    """Which items are hard, from the scores of the full model and of the down-sampled image; NaN is never hard."""
    return (full >= RIGHT) & (smaller < RIGHT)


def on_hard_items(scores: np.ndarray, full: np.ndarray) -> dict[str, Any]:
    """`HARD_COLUMNS` of one method; ``hard_low`` and ``hard_high`` are a 95 % interval of ``hard_score``.

    Args:
        scores: of the hard items, ``[draws, items]``.
        full: the full model's, ``[items]``.
    """
    count = scores.shape[1]
    if not count:
        return dict(zip(HARD_COLUMNS, (0, *[math.nan] * 4), strict=True))
    mean = float(scores.mean())
    return dict(
        zip(HARD_COLUMNS, (count, mean, *score_interval(scores), mean / float(full.mean())), strict=True)
    )


def describe_hard(count: int, total: int) -> str:
    """How many items are hard, and whether they are too few."""
    few = f"; fewer than {FEWEST} are too few for a conclusion" if count < FEWEST else ""
    return (
        f"hard subset: {count} of {total} items, which the full model answers and smaller images do not{few}"
    )
