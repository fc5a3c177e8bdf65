"""The default detector: regimes, isolated layers and their support from distances between layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from schedule_finder.change_points.base import (
    REPORTED_SUPPORT,
    Change,
    ChangePoints,
    Interval,
    IsolatedLayer,
    Regime,
    ShiftEvidence,
)
from schedule_finder.change_points.confirmation import ABRUPT, abruptness, gain_beside_noise
from schedule_finder.change_points.distances import LayerDistances, layer_distances
from schedule_finder.change_points.isolated import (
    find_candidates,
    is_isolated,
    layer_parts,
    without_majorities,
)
from schedule_finder.change_points.noise_model import (
    SMALLEST_OWN,
    NoiseModel,
    estimate_dimensions,
    estimate_own,
    largest_drift,
    raw_own,
)
from schedule_finder.change_points.permutation import chance_levels, tested_breaks
from schedule_finder.change_points.regimes import (
    cluster_segments,
    effect_size,
    segment_numbers,
    unbiased_distance,
)
from schedule_finder.change_points.segmentation import (
    MIN_SIZE,
    SegmentCosts,
    breaking_penalty,
    segment,
    total_cost,
)
from schedule_finder.change_points.stability import resample_weights
from schedule_finder.intervals import band

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

SMALLEST_CHANGE = 4 * SMALLEST_OWN
"""Nats between the means of two regimes: twice what two layers of one regime are taken to differ by at least. Slow
drift of long decoders adds up to less; the changes of the acceptance table and of the pretrained profile are larger."""
DRIFT_MARGIN = 1.0
"""What the model with drift has to be more likely by, twice the log-likelihood per dimension: three times the
simulation error of a penalty, which otherwise decides where both are as likely."""
CLEAR_EFFECT = 1.0
"""Effect size from which a change stands without the permutation test: the regimes differ by more than two layers
of one regime do."""


@dataclass(frozen=True)
class Segmentation:
    """The chosen noise model with its costs, and breaks (indices into the segmented layers) with their penalties."""

    model: NoiseModel
    costs: SegmentCosts
    table: np.ndarray
    penalty: float
    breaks: dict[int, float]


@dataclass(frozen=True)
class AttentionShift:
    """Kernel change-point detection on layer distances, with a noise level of its own for every layer.

    1. *Distances* (`distances`): per sample the Bhattacharyya distance of every two layers; mean over samples.
    2. *Noise model* (`noise_model`): each layer's own part, drift and effective dimensions, all read off distances
       in which the own parts, the drift or changes cancel.
    3. *Segmentation* (`segmentation`): generalised least squares about each segment's mean, and a penalty per
       change. Two models are fitted. Without drift, the penalty is the ``level`` quantile of what breaks in shuffled
       layers, part by part (`permutation`). With drift it is the same quantile over profiles simulated from the
       noise model, and a change that the permutation test did not find needs an effect size of `CLEAR_EFFECT`. The
       model with the higher penalised likelihood is taken. Changes below `SMALLEST_CHANGE` are dropped.
    4. *Isolated layers* (`isolated`): never a change, as no regime has fewer than two layers and a single layer
       gains nothing by a segment of its own.
    5. *Support* (`stability`): the share of resamples in which a finding is made again. A change is found again
       where the best break between its neighbouring changes lies within one layer and gains more than its penalty.
       Findings below `REPORTED_SUPPORT` are dropped.
    6. *Returning regimes* (`regimes`): segments that a change would not separate have the same cluster.

    The sampling error needs no extra term: the mean over samples enters every estimate, so what is particular to
    samples appears in own parts and dimensions, and the resamples show what it does to the result.

    Sources: Arlot, Celisse, Harchaoui (2019) and Garreau, Arlot (2018) for kernel change-point detection; Gretton
    et al. (2012) for the unbiased squared distance; Meinshausen, Buehlmann (2010) for stability selection.
    """

    level: float = 0.99
    simulations: int = 200
    resamples: int = 200
    name: str = "attention_shift"

    def detect(
        self, maps: Iterable[np.ndarray], *, layers: Sequence[int] | None = None, seed: int = 0
    ) -> ChangePoints:
        """See `Detector.detect`. Layers without attention on vision tokens in any sample are left out."""
        return self.detect_in(layer_distances(maps), layers=layers, seed=seed)

    def detect_in(
        self, distances: LayerDistances, *, layers: Sequence[int] | None = None, seed: int = 0
    ) -> ChangePoints:
        """Find changes and isolated layers in ``distances`` that are already computed."""
        number = np.arange(distances.num_rows) if layers is None else np.asarray(layers)
        number = number[distances.layers]
        size = len(number)
        if size < 2 * MIN_SIZE or not len(distances):
            reason = (
                f"{distances.num_rows} layers, {size} layers with attention: too few for two regimes of "
                f"{MIN_SIZE} layers"
            )
            evidence = ShiftEvidence(num_layers=distances.num_rows, reason=reason)
            return ChangePoints(detector=self.name, changes=[], evidence=evidence)

        pairs, uniform = distances.mean()
        found = self.segment(pairs[0], seed)
        again, again_uniform = distances.mean(resample_weights(len(distances), self.resamples, seed))
        support = _support(found, found.costs.tables(again))
        breaks = [b for b in found.breaks if support[b] >= REPORTED_SUPPORT]
        isolated: list[IsolatedLayer] = []
        if uniform is not None and again_uniform is not None:
            isolated = _isolated(pairs, uniform, again, again_uniform, breaks, number)
        clusters = cluster_segments(pairs[0], found.model.own, breaks, found.penalty)
        bounds = [0, *breaks, size]
        regular = ~np.isin(number, [layer.layer for layer in isolated])
        return ChangePoints(
            detector=self.name,
            changes=[
                Change(
                    layer=int(number[b]),
                    support=support[b],
                    effect=_effect(pairs[0], regular, a, b, c),
                    gain=float(_gain(found.table, a, b, c)) / found.breaks[b],
                )
                for a, b, c in zip(bounds, bounds[1:], bounds[2:], strict=False)
            ],
            regimes=[
                Regime(first=int(number[a]), last=int(number[b - 1]), cluster=cluster)
                for (a, b), cluster in zip(pairwise(bounds), clusters, strict=True)
            ],
            isolated_layers=isolated,
            evidence=self._evidence(distances, pairs[0], again, found, number, seed),
        )

    def segment(self, distance: np.ndarray, seed: int = 0) -> Segmentation:
        """Noise model, penalties and breaks of one mean distance matrix ``[num_layers, num_layers]``."""
        tested = tested_breaks(distance, self.simulations, self.level, seed)
        levels = chance_levels(distance, self.simulations, self.level, seed)
        own = estimate_own(distance[None])[0]
        dimensions = estimate_dimensions(distance)
        choices = []
        for drift in (0.0, largest_drift(distance, own)):
            model = NoiseModel(own, drift, dimensions)
            costs = SegmentCosts(model)
            table = costs.tables(distance[None])[0]
            if drift:
                simulated = breaking_penalty(costs.tables(model.simulate(self.simulations, seed)))
                penalty = max(float(np.quantile(simulated, self.level)), levels.simulated)
                breaks = dict.fromkeys(segment(table, penalty), penalty)
            else:
                penalty, breaks = levels.penalty, {one.layer: one.penalty for one in tested}
            # Twice the negative log-likelihood per dimension, penalised.
            value = (
                total_cost(table, list(breaks)) + costs.log_determinant(list(breaks)) + penalty * len(breaks)
            )
            choices.append(
                (value + DRIFT_MARGIN * bool(drift), Segmentation(model, costs, table, penalty, breaks))
            )
        best = min(choices, key=lambda one: one[0])[1]
        sure = range(len(distance)) if best.model.drift == 0 else [one.layer for one in tested]
        return replace(best, breaks=_confirmed(distance, best, sure))

    def _evidence(
        self,
        distances: LayerDistances,
        mean: np.ndarray,
        again: np.ndarray,
        found: Segmentation,
        number: np.ndarray,
        seed: int,
    ) -> ShiftEvidence:
        model = found.model
        steps = np.arange(len(mean) - 1)
        curve = band(distances.pairs[:, steps, steps + 1], seed=seed)
        draws = again[: len(again) - len(again) // 4 * 2]
        return ShiftEvidence(
            num_layers=distances.num_rows,
            num_samples=len(distances),
            layers=number.tolist(),
            distance=np.round(mean, 6).tolist(),
            own=model.own.tolist(),
            own_error=np.std(estimate_own(draws), axis=0).tolist(),
            drift=model.drift,
            dimensions=model.dimensions,
            penalty=found.penalty,
            level=self.level,
            shift=Interval(
                unit="Bhattacharyya distance, nats",
                mean=curve.mean.tolist(),
                low=curve.low.tolist(),
                high=curve.high.tolist(),
                level=curve.level,
            ),
            expected_shift=(model.own[1:] + model.own[:-1] + model.drift).tolist(),
        )


def _isolated(
    pairs: np.ndarray,
    uniform: np.ndarray,
    again: np.ndarray,
    again_uniform: np.ndarray,
    breaks: Sequence[int],
    number: np.ndarray,
) -> list[IsolatedLayer]:
    """Isolated layers with enough support; ``again`` are the resamples' distances."""
    regime = segment_numbers(breaks, len(number))
    candidates = find_candidates(pairs, uniform, regime)
    parts = layer_parts(pairs, uniform, regime, candidates)
    found = np.flatnonzero(without_majorities(is_isolated(parts, candidates)[0], regime)).tolist()
    if not found:
        return []
    support = is_isolated(layer_parts(again, again_uniform, regime, candidates), candidates).mean(axis=0)
    isolated = []
    for layer in found:
        to_others = pairs[0, layer].copy()
        to_others[layer] = np.inf
        nearest = int(to_others.argmin())
        if support[layer] >= REPORTED_SUPPORT:
            isolated.append(
                IsolatedLayer(
                    layer=int(number[layer]),
                    distance=float(parts.own[0, layer]),
                    shared=float(parts.shared[0, layer]),
                    nearest=int(number[nearest]),
                    nearest_distance=float(to_others[nearest]),
                    support=float(support[layer]),
                )
            )
    return isolated


def _confirmed(distance: np.ndarray, found: Segmentation, sure: Collection[int]) -> dict[int, float]:
    """Drop changes, the least certain first, until each meets every condition.

    A change has to be large enough, abrupt, and more than noise of another size makes (`confirmation`); unless it
    is near one that is ``sure``, its effect must be clear too.
    """
    amplitude = np.sqrt(raw_own(distance[None])[0])
    kept = dict(found.breaks)
    while kept:
        bounds = [0, *kept, len(distance)]
        room = {}
        for a, b, c in zip(bounds, bounds[1:], bounds[2:], strict=False):
            first, second = np.arange(a, b), np.arange(b, c)
            room[b] = min(
                unbiased_distance(distance, first, second) / SMALLEST_CHANGE,
                abruptness(distance, found.model.own, a, b, c) / ABRUPT,
                gain_beside_noise(distance, found.model, amplitude, a, b, c) / kept[b],
            )
            if not any(abs(b - one) <= 1 for one in sure):
                room[b] = min(room[b], effect_size(distance, first, second) / CLEAR_EFFECT)
        least = min(room, key=room.__getitem__)
        if room[least] >= 1:
            break
        del kept[least]
    return kept


def _support(found: Segmentation, tables: np.ndarray) -> dict[int, float]:
    """Share of the resamples, with costs ``tables``, in which each break is found again."""
    support = {}
    bounds = [0, *found.breaks, len(found.table) - 1]
    for a, b, c in zip(bounds, bounds[1:], bounds[2:], strict=False):
        places = np.arange(a + MIN_SIZE, c - MIN_SIZE + 1)
        gains = _gain(tables, a, places, c)
        best = gains.argmax(axis=1)
        again = (abs(places[best] - b) <= 1) & (gains.max(axis=1) > found.breaks[b])
        support[b] = float(again.mean())
    return support


def _gain(table: np.ndarray, start: int, middle: int | np.ndarray, end: int) -> np.ndarray:
    """What a break at ``middle`` takes off the cost of ``start .. end``; ``table`` may have leading axes."""
    parts = table[..., start, middle] + table[..., middle, end]
    whole = table[..., start, end]
    return np.asarray((whole[..., None] if np.ndim(middle) else whole) - parts)


def _effect(distance: np.ndarray, regular: np.ndarray, start: int, middle: int, end: int) -> float:
    """Effect size of the change at ``middle``; isolated layers are left out where enough others are left."""
    groups = []
    for a, b in ((start, middle), (middle, end)):
        layers = np.arange(a, b)
        kept = layers[regular[a:b]]
        groups.append(kept if len(kept) >= MIN_SIZE else layers)
    return effect_size(distance, *groups)
