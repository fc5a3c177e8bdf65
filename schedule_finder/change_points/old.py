"""Change points of what text looks at in the image: two detectors behind one interface.

A change point ``l`` is the 0-based first layer of the new regime, so the last layer of the old one, at
which a stage would score and prune, is ``l - 1``. The only module that imports ruptures.

``distribution_shift``
    The default. Segments of layers within which the *distribution* over vision tokens stays put.
``token_curve``
    The AdaptInfer recipe to the letter of METHODS.md, with a stated rule in place of the eye. Kept
    for comparison: a cumulative curve breaks where its ramp is half way, not where attention moves,
    so what a straight ramp would give always stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import ruptures
from ruptures.base import BaseCost

from schedule_finder.signals import (
    band,
    bootstrap_weights,
    checked_maps,
    layer_shift,
    top_token_curves,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# A regime has at least two layers: one layer cannot be told from noise. It is also what ruptures'
# Binseg does by default (`min_size=2`), and so what the paper's recipe does.
MIN_SIZE = 2


@dataclass(frozen=True)
class Detection:
    """What a detector found, and why; ``evidence`` is plain JSON-able data."""

    detector: str
    change_points: list[int]
    evidence: dict[str, Any]


class Detector(Protocol):
    """Maps of a profile -> change points."""

    @property
    def name(self) -> str:
        """Its name in `DETECTORS`."""
        ...

    def detect(self, maps: Sequence[np.ndarray], *, seed: int = 0) -> Detection:
        """Find the change points of ``maps``, one ``[num_layers, num_vision]`` per sample."""
        ...


@dataclass(frozen=True)
class TokenCurve:
    """The AdaptInfer recipe (arXiv 2508.06084) as METHODS.md describes it.

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

    def detect(self, maps: Sequence[np.ndarray], *, seed: int = 0) -> Detection:
        """See the class; ``seed`` draws the shuffles. Evidence is indexed by ``break - 1``."""
        by_sample = [top_token_curves(s, self.share) for s in checked_maps(maps)]
        curves = np.concatenate(by_sample)
        owner = np.repeat(np.arange(len(by_sample)), [len(c) for c in by_sample])
        num_layers = curves.shape[1]
        if num_layers < 2 * MIN_SIZE or not len(curves):
            return _nothing(self.name, num_layers, len(curves), "curves")

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
        return Detection(
            self.name,
            [index + 1 for index in peaks],
            {
                "num_layers": num_layers,
                "num_curves": len(curves),
                "min_size": MIN_SIZE,
                "histogram": histogram.tolist(),
                "straight_ramp": (_histogram(ramp, num_layers) * len(curves)).tolist(),
                "shuffled_layers": (expected * len(curves)).tolist(),
                "excess_share": (observed - expected).tolist(),
                "excess_threshold": threshold,
                "level": self.level,
            },
        )


@dataclass(frozen=True)
class DistributionShift:
    """Segments of layers within which the distribution over vision tokens stays put.

    *Signal.* The square roots of each sample's vision distributions, samples side by side. The
    squared distance of two layers is then twice the squared Hellinger distance, averaged over
    samples, and the whole signal is known by its ``[num_layers, num_layers]`` Gram matrix.

    *Null.* Inside a regime, layer ``l`` is the regime's mean, plus noise of energy ``noise`` of its
    own, plus a random walk of energy ``drift`` per layer, as trained backbones drift a little at
    every layer. Both are read off the data: the random walk alone drives the unbiased squared
    distance (MMD) of the two layers before a gap from the two after it, so its median over gaps is
    ``drift``; the median distance of neighbours is ``2 * noise + drift``. Gaps at change points
    already found are left out and the search is repeated until nothing moves. As changes not yet left
    out pass for drift and hide themselves, the first pass asks for only ``first_pass`` of the penalty;
    what it finds wrongly, the later passes drop.

    *Cost* of a segment: the generalised least-squares residual about its mean under that covariance.
    Without drift it is the l2 cost over noise; without noise it sums the gaps inside the segment.

    *Penalty* per break: the smallest that finds no break in ``level`` of the profiles simulated from
    the null, in as many dimensions as the layers' increments effectively have, with noise that varies
    from layer to layer by a factor ``exp(spread * normal)``. Exact search by ``ruptures.Pelt``.

    *Limits*, measured by ``scripts/bench_detectors.py``: shifts are found where neighbours inside a regime
    differ by up to about 1/8 of what a shift does (JS), up to 1/4 if there are one or two; beyond that they
    are missed rather than invented. Layers whose noise differs a lot (amplitudes from 0.3 to 2) do cause
    false alarms. ``support`` is about samples; noise in the weights is common to all and stays in it.

    Noise is never taken as less than ``floor`` (squared Hellinger distance of neighbours, in [0, 1]): in a
    profile that hardly moves, a difference too small to matter is no finding, and nor is rounding.
    """

    level: float = 0.99
    spread: float = 0.5
    floor: float = 0.005
    simulations: int = 200
    resamples: int = 100
    first_pass: float = 0.8
    max_passes: int = 5
    name: str = "distribution_shift"

    def detect(self, maps: Sequence[np.ndarray], *, seed: int = 0) -> Detection:
        """See the class; ``seed`` draws simulations and resamples.

        Layers that gave vision nothing in any sample (no attention there to see) are left out;
        change points keep the backbone's layer numbers.
        """
        samples = checked_maps(maps)
        num_layers = len(samples[0])
        heard = np.flatnonzero(np.any([s.sum(axis=1) > 0 for s in samples], axis=0))
        if len(heard) < 2 * MIN_SIZE:
            return _nothing(self.name, num_layers, len(heard), "layers with attention")
        samples = [s[heard] for s in samples if s.any()]
        grams = np.stack([_hellinger_gram(s) for s in samples])
        gram = grams.mean(axis=0)

        found, null, whiteners, penalty = self._search(gram, seed)
        table = _cost_tables(gram[None], whiteners)[0]
        weights = bootstrap_weights(len(samples), self.resamples, seed) / len(samples)
        resampled = np.tensordot(weights, grams, 1)
        tables = _cost_tables(resampled, whiteners)
        drawn = [np.array(_segment(t, penalty), dtype=int) for t in tables]
        support = [float(np.mean([(abs(d - cp) <= 1).any() for d in drawn])) for cp in found]
        shift = layer_shift(samples)
        curve = band(shift, seed=seed)
        quiet = np.delete(curve.mean, [cp - 1 for cp in found])
        quiet = quiet[~np.isnan(quiet)]
        hellinger = _gaps(gram) / 2
        bounds = [0, *found, len(heard)]
        return Detection(
            self.name,
            [int(heard[cp]) for cp in found],
            {
                "num_layers": num_layers,
                "num_samples": len(samples),
                "min_size": MIN_SIZE,
                "layers": heard.tolist(),
                # Entry g: from layers[g] to layers[g + 1].
                "shift": {
                    "unit": "Jensen-Shannon divergence, bits",
                    "mean": _json(curve.mean),
                    "low": _json(curve.low),
                    "high": _json(curve.high),
                    "level": curve.level,
                    "null": float(np.median(quiet)) if len(quiet) else None,
                },
                # Same gaps, in [0, 1]; inside a regime about noise + drift.
                "hellinger_squared": hellinger.tolist(),
                "noise": null.noise,
                "drift": null.drift / 2,
                "dimensions": null.dimensions,
                "penalty": penalty,
                "level": self.level,
                # What leaving one out would cost, in units of the penalty's: each is above it.
                "gain": [
                    float(table[a, c] - table[a, b] - table[b, c])
                    for a, b, c in zip(bounds, bounds[1:], bounds[2:], strict=False)
                ],
                "support": support,
            },
        )

    def _search(self, gram: np.ndarray, seed: int) -> tuple[list[int], Null, Whiteners, float]:
        """Repeat null, penalty and segmentation of ``[num_layers, num_layers]`` until nothing moves."""
        found: list[int] = []
        lenience = self.first_pass
        for _ in range(self.max_passes):
            null = _estimate_null(gram, found, self.floor)
            whiteners = _whiteners(len(gram), null)
            penalty = self._penalty(len(gram), null, whiteners, seed)
            table = _cost_tables(gram[None], whiteners)[0]
            before, found = found, _segment(table, lenience * penalty)
            if found == before and lenience == 1:
                break
            lenience = 1.0
        return found, null, whiteners, penalty

    def _penalty(self, num_layers: int, null: Null, whiteners: Whiteners, seed: int) -> float:
        rng = np.random.default_rng(seed)
        shape = (self.simulations, num_layers, null.dimensions)
        uneven = np.exp(self.spread * rng.standard_normal((self.simulations, num_layers, 1)))
        noise = np.sqrt(null.noise) * uneven * rng.standard_normal(shape)
        walk = np.cumsum(np.sqrt(null.drift) * rng.standard_normal(shape), axis=1)
        signal = (noise + walk) / np.sqrt(null.dimensions)
        grams = signal @ signal.transpose(0, 2, 1)
        return float(np.quantile(_breaking_penalty(_cost_tables(grams, whiteners)), self.level))


DETECTORS: dict[str, Callable[[], Detector]] = {
    "distribution_shift": DistributionShift,
    "token_curve": TokenCurve,
}
DEFAULT_DETECTOR = "distribution_shift"


def get_detector(name: str) -> Detector:
    """Make the detector called ``name``."""
    if name not in DETECTORS:
        raise ValueError(f"detector: {name!r}, need one of {', '.join(sorted(DETECTORS))}")
    return DETECTORS[name]()


# --- token_curve -------------------------------------------------------------------------------


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


# --- distribution_shift ------------------------------------------------------------------------


@dataclass(frozen=True)
class Null:
    """How layers of one regime differ: energies are squared distances in the signal's space."""

    noise: float
    drift: float
    dimensions: int


Whiteners = dict[int, np.ndarray]  # segment length -> [length, length]


def _hellinger_gram(sample: np.ndarray) -> np.ndarray:
    """Affinity ``sum_v sqrt(p_v q_v)`` of every two layers of a map, ``[num_layers, num_layers]``.

    A layer that gave vision nothing takes the distribution of the last that did (before the first:
    of the first), so that a missing layer is no change.
    """
    mass = sample.sum(axis=1)
    known = np.flatnonzero(mass > 0)
    source = known[np.maximum(np.searchsorted(known, np.arange(len(sample)), side="right") - 1, 0)]
    root = np.sqrt(sample[source] / mass[source, None])
    # Not `@`: a thousand small products make BLAS threads fight over a busy machine (0.3 s became 23 s).
    return np.einsum("lv,mv->lm", root, root)


def _gaps(gram: np.ndarray) -> np.ndarray:
    """Squared distance of neighbouring layers, ``[num_layers - 1]``."""
    diagonal = np.diag(gram)
    return diagonal[1:] + diagonal[:-1] - 2 * np.diag(gram, 1)


def _estimate_null(gram: np.ndarray, found: list[int], floor: float) -> Null:
    """Read noise, drift and effective dimensions off the gaps that are not at ``found``."""
    length = len(gram)
    gaps = np.setdiff1d(np.arange(1, length), found)
    # MMD at l compares layers (l-2, l-1) with (l, l+1): free of a change at b if |l - b| > 1.
    inner = np.arange(2, length - 1)
    clear = inner[[all(abs(gap - b) > 1 for b in found) for gap in inner]]
    # Fewer than four are too few for a median: better all, with the changes among them.
    gaps = gaps if len(gaps) >= 4 else np.arange(1, length)
    clear = clear if len(clear) >= 4 else inner

    mmd = np.array([
        gram[g, g + 1] + gram[g - 1, g - 2] - 2 * gram[g - 2 : g, g : g + 2].mean() for g in clear
    ])  # fmt: skip
    drift = max(float(np.median(mmd)), 0.0)
    noise = max((float(np.median(_gaps(gram)[gaps - 1])) - drift) / 2, floor)

    # In d dimensions two independent directions have a mean squared cosine of 1 / d. Neighbouring
    # increments share a layer, so only those two or more apart are independent.
    step = np.diff(np.diff(gram, axis=0), axis=1)[np.ix_(gaps - 1, gaps - 1)]
    norm = np.sqrt(np.maximum(np.diag(step), 1e-12))
    apart = np.abs(np.subtract.outer(gaps, gaps)) >= 2
    cosine = (step / np.outer(norm, norm))[apart]
    dimensions = 1 / max(float(np.mean(cosine**2)), 1e-3) if cosine.size else 1.0
    return Null(noise, drift, int(np.clip(round(dimensions), 1, 40)))


def _whiteners(num_layers: int, null: Null) -> Whiteners:
    """Per segment length the matrix ``W`` whose ``sum(W * gram)`` is the segment's cost."""
    whiteners = {}
    for length in range(MIN_SIZE, num_layers + 1):
        walk = np.minimum.outer(np.arange(length), np.arange(length))
        inverse = np.linalg.inv(null.noise * np.eye(length) + null.drift * walk)
        row = inverse.sum(axis=0)
        whiteners[length] = inverse - np.outer(row, row) / row.sum()
    return whiteners


def _cost_tables(grams: np.ndarray, whiteners: Whiteners) -> np.ndarray:
    """Costs of all segments: ``[n, num_layers + 1, num_layers + 1]``, entry ``[i, start, end]``.

    ``grams`` is ``[n, num_layers, num_layers]``; segments that are too short cost infinity.
    """
    n, length, _ = grams.shape
    tables = np.full((n, length + 1, length + 1), np.inf)
    for start in range(length):
        for end in range(start + MIN_SIZE, length + 1):
            part = grams[:, start:end, start:end].reshape(n, -1)
            tables[:, start, end] = np.einsum("ns,s->n", part, whiteners[end - start].ravel())
    return tables


def _breaking_penalty(tables: np.ndarray, max_breaks: int = 4) -> np.ndarray:
    """The penalty per break at which each table's best segmentation gets its first break, ``[n]``."""
    length = tables.shape[1] - 1
    best = tables[:, 0, :]
    penalty = np.full(len(tables), -np.inf)
    for count in range(1, min(max_breaks, length // MIN_SIZE - 1) + 1):
        longer = np.full_like(best, np.inf)
        for end in range((count + 1) * MIN_SIZE, length + 1):
            longer[:, end] = (best[:, :end] + tables[:, :end, end]).min(axis=1)
        best = longer
        penalty = np.maximum(penalty, (tables[:, 0, length] - best[:, length]) / count)
    return penalty


class _TableCost(BaseCost):  # type: ignore[misc]  # ruptures is not typed
    """Costs looked up in a table. ruptures ignores a custom cost that is no ``BaseCost``."""

    model = "table"
    min_size = MIN_SIZE

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self.signal = table[1:]

    def fit(self, signal: np.ndarray) -> _TableCost:
        return self

    def error(self, start: int, end: int) -> float:
        return float(self.table[start, end])


def _segment(table: np.ndarray, penalty: float) -> list[int]:
    """Change points of the cheapest segmentation, ``penalty`` per break; exact."""
    search = ruptures.Pelt(custom_cost=_TableCost(table), min_size=MIN_SIZE, jump=1)
    return [int(b) for b in search.fit(table[1:]).predict(pen=penalty)[:-1]]  # the last is the end


def _json(values: np.ndarray) -> list[float | None]:
    """JSON has no NaN: a gap that no sample knows is null."""
    return [None if np.isnan(v) else float(v) for v in values]


def _nothing(name: str, num_layers: int, count: int, what: str) -> Detection:
    reason = f"{num_layers} layers, {count} {what}: too few for two regimes of {MIN_SIZE} layers"
    return Detection(name, [], {"num_layers": num_layers, "reason": reason})
