"""The paper's recipe: where the cumulative attention of single tokens breaks.

Kept for comparison. A cumulative curve breaks where its ramp is half way, not where attention moves, so the breaks
of a straight ramp and of shuffled layers stand beside the histogram.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from schedule_finder.change_points.base import Change, ChangePoints, CurveEvidence
from schedule_finder.change_points.distances import ALWAYS_READ
from schedule_finder.change_points.segmentation import MIN_SIZE
from schedule_finder.signals import by_place, checked_in_any_order, spread, top_token_curves

MOST_CURVES = 2**18
"""Curves that are read, about: those of 4500 samples of 576 vision tokens, 170 MB at 80 layers."""


@dataclass(frozen=True)
class TokenCurve:
    """The AdaptInfer recipe (arXiv 2508.06084) as docs/methods.md describes it.

    Per sample the ``share`` of tokens with most total attention; per token the cumulative sum over
    layers and the one break that ``ruptures.Binseg(model="l2", jump=1)`` puts in it; a histogram of
    ``break - 1`` over layers.

    Reading the histogram: a change point is an index that is a local maximum of the *excess* (the
    share of tokens that break there, less the mean share when the layers of every sample are shuffled)
    and whose excess is larger than the largest excess of any index in ``level`` of the shuffles, and
    than ``min_excess``, below which no eye would see it. A shuffled profile's ramp is straight but for
    the same samples' noise: the matched straight-ramp null. Within one layer of where a plain ramp
    splits, a peak is never read: noise that all samples share moves the split that far.
    """

    share: float = 0.1
    level: float = 0.95
    min_excess: float = 0.05
    shuffles: int = 100
    null_curves: int = 2000  # curves per shuffle; a subset, as the null needs no more
    name: str = "token_curve"

    def detect(
        self, maps: Iterable[np.ndarray], *, layers: Sequence[int] | None = None, seed: int = 0
    ) -> ChangePoints:
        """See `Detector.detect`; ``seed`` draws the shuffles. Evidence is indexed by ``break - 1``."""
        if isinstance(maps, Sequence) and len(maps):
            maps = spread(maps, max(ALWAYS_READ, int(MOST_CURVES / self.share) // max(maps[0].shape[1], 1)))
        curves_at = {
            place: top_token_curves(sample, self.share) for place, sample in checked_in_any_order(maps)
        }
        by_sample = by_place(curves_at)
        curves = np.concatenate(by_sample)
        owner = np.repeat(np.arange(len(by_sample)), [len(c) for c in by_sample])
        num_layers = curves.shape[1]
        if num_layers < 2 * MIN_SIZE or not len(curves):
            reason = (
                f"{num_layers} layers, {len(curves)} curves: too few for two regimes of {MIN_SIZE} layers"
            )
            evidence = CurveEvidence(num_layers=num_layers, num_curves=len(curves), reason=reason)
            return ChangePoints(detector=self.name, changes=[], evidence=evidence)

        histogram = _histogram(single_breaks(curves), num_layers)
        observed = histogram / len(curves)
        some = slice(None, None, -(-len(curves) // self.null_curves))
        steps, owner = np.diff(curves[some], axis=1, prepend=0.0), owner[some]
        rng = np.random.default_rng(seed)
        null = np.empty((self.shuffles, num_layers))
        for row in null:
            order = rng.random((len(by_sample), num_layers)).argsort(axis=1)[owner]
            shuffled = np.cumsum(np.take_along_axis(steps, order, axis=1), axis=1)
            row[:] = _histogram(single_breaks(shuffled), num_layers) / len(steps)
        expected = null.mean(axis=0)
        unlikely = float(np.quantile((null - expected).max(axis=1), self.level))
        threshold = max(unlikely, self.min_excess)
        ramp = single_breaks(np.arange(1.0, num_layers + 1)[None])
        peaks = [i for i in _peaks(observed - expected, threshold) if abs(i - (ramp[0] - 1)) > 1]
        number = range(num_layers) if layers is None else layers
        return ChangePoints(
            detector=self.name,
            changes=[Change(layer=number[index + 1]) for index in peaks],
            evidence=CurveEvidence(
                num_layers=num_layers,
                num_curves=len(curves),
                histogram=histogram.tolist(),
                straight_ramp=(_histogram(ramp, num_layers) * len(curves)).tolist(),
                shuffled_layers=(expected * len(curves)).tolist(),
                excess_share=(observed - expected).tolist(),
                excess_threshold=threshold,
                level=self.level,
            ),
        )


def single_breaks(curves: np.ndarray) -> np.ndarray:
    """Best single l2 break of each curve, as ``ruptures.Binseg(model="l2", jump=1)`` puts it.

    Args:
        curves: ``[num_curves, num_layers]``, ``num_layers >= 4``.

    Returns:
        ``[num_curves]`` of int: first layer of the second part, in ``[2, num_layers - 2]``.

    A closed form: the best break maximises ``sum_left^2 / b + sum_right^2 / (n - b)`` of the centred
    curve. Binseg compares differences of variances instead and gives ties to the later break, so
    where two breaks are as good as equal its rounding decides; those curves are redone with its
    arithmetic, operation by operation, and the answer is the same for every curve.
    """
    curves = np.ascontiguousarray(curves, dtype=np.float64)
    length = curves.shape[1]
    breaks = np.arange(MIN_SIZE, length - MIN_SIZE + 1)
    left = np.cumsum(curves - curves.mean(axis=1, keepdims=True), axis=1)[:, breaks - 1]
    gain = left**2 * (1 / breaks + 1 / (length - breaks))
    best = gain.max(axis=1, keepdims=True)
    # Rounding in either formula is relative to the squares that go in, not to the gain.
    tolerance = 1e-11 * (curves**2).sum(axis=1, keepdims=True)
    found = breaks[gain.argmax(axis=1)]
    close = np.flatnonzero((gain >= best - tolerance).sum(axis=1) > 1)
    if len(close):
        found[close] = _single_breaks_as_binseg(curves[close], breaks)
    return found


def _single_breaks_as_binseg(curves: np.ndarray, breaks: np.ndarray) -> np.ndarray:
    """Binseg's comparison with its rounding: variances of slices, the later break on a tie."""
    length = curves.shape[1]

    def cost(start: int, end: int) -> np.ndarray:
        return curves[:, start:end].var(axis=1) * (end - start)

    whole = cost(0, length)
    gain = np.stack([whole - cost(0, b) - cost(b, length) for b in breaks], axis=1)
    return breaks[len(breaks) - 1 - gain[:, ::-1].argmax(axis=1)]


def _histogram(breaks: np.ndarray, num_layers: int) -> np.ndarray:
    return np.bincount(breaks - 1, minlength=num_layers)


def _peaks(excess: np.ndarray, threshold: float) -> list[int]:
    """Indices above ``threshold`` and above both neighbours; of a plateau, the first."""
    padded = np.concatenate([[-np.inf], excess, [-np.inf]])
    is_peak = (padded[1:-1] > padded[:-2]) & (padded[1:-1] >= padded[2:]) & (excess > threshold)
    return [int(i) for i in np.flatnonzero(is_peak)]
