"""Curves per layer from a profile. Pure NumPy.

``maps`` is everywhere a sequence with one array per sample, ``[num_layers, num_vision]``: attention
mass that the text queries give each vision token, mean over heads and text queries. ``num_vision`` may differ from
sample to sample; a row of zeros is a layer that gave vision nothing. They may be `StoredScores`, which are larger than
memory: functions here read them in any order and keep small results by place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

ENOUGH_SAMPLES = 4096
"""Of more samples, so many say what a mean over all says."""

T = TypeVar("T")


def in_any_order(maps: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Every map with its place, in the order in which they are read fastest."""
    read = getattr(maps, "in_any_order", None)
    return enumerate(maps) if read is None else read()


def spread(maps: Iterable[np.ndarray], most: int = ENOUGH_SAMPLES) -> Iterable[np.ndarray]:
    """About ``most`` of the maps, evenly spread; all where their number is not known."""
    read = getattr(maps, "spread", None)
    if read is not None:
        return read(most)
    if not isinstance(maps, Sequence) or len(maps) <= most:
        return maps
    return maps[:: -(-len(maps) // most)]


def by_place(rows: Mapping[int, T]) -> list[T]:
    """The values in the order of their keys."""
    return [rows[place] for place in sorted(rows)]


def checked_maps(maps: Iterable[np.ndarray]) -> list[np.ndarray]:
    """All of `checked_in_any_order` at once, by place."""
    return [sample for _, sample in sorted(checked_in_any_order(maps), key=lambda one: one[0])]


def checked_in_any_order(maps: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Check maps from outside and yield those that have vision tokens, as float64, with their places.

    Raises:
        ValueError: no sample, no sample with vision tokens, unequal numbers of layers, or values that are
            not finite or below zero; the message names the sample.
    """
    num_layers: int | None = None
    number = usable = 0
    for index, raw in in_any_order(maps):
        number += 1
        sample = np.asarray(raw, dtype=np.float64)
        if sample.ndim != 2:
            raise ValueError(f"maps[{index}]: shape {sample.shape}, need [num_layers, num_vision]")
        if num_layers is not None and len(sample) != num_layers:
            raise ValueError(f"maps[{index}]: {len(sample)} layers, earlier samples {num_layers}")
        num_layers = len(sample)
        # A sum is finite only where all values are (or where they are absurdly large).
        if not np.isfinite(sample.sum()) and not np.isfinite(sample).all():
            raise ValueError(f"maps[{index}]: values that are NaN or infinite, need finite >= 0")
        if sample.size and sample.min() < 0:
            raise ValueError(f"maps[{index}]: lowest value {sample.min():g}, attention is >= 0")
        if sample.shape[1]:
            usable += 1
            yield index, sample
    if not usable:
        raise ValueError(f"maps: {number} samples, none with vision tokens; need at least one")


def vision_distribution(sample: np.ndarray) -> np.ndarray:
    """Normalise each layer of a map ``[num_layers, num_vision]`` to sum 1; empty rows become NaN."""
    total = sample.sum(axis=1, keepdims=True)
    return np.divide(sample, total, out=np.full_like(sample, np.nan), where=total > 0)


def carried_by_best(sample: np.ndarray) -> np.ndarray:
    """Share of each layer's attention on vision that its best 1, 2, ... tokens carry, ``[layers, num_vision]``."""
    distribution = np.nan_to_num(vision_distribution(np.asarray(sample, dtype=np.float64)))
    return np.sort(distribution, axis=1)[:, ::-1].cumsum(1)


def tokens_to_carry(carried: np.ndarray, share: float) -> np.ndarray:
    """How many of the best tokens carry ``share`` of a layer's attention, ``[layers]``.

    ``carried`` is what `carried_by_best` returns. Nothing takes no token.
    """
    enough = share - 1e-9
    return (carried < enough).sum(1) + (enough > 0)


def vision_curve(maps: Iterable[np.ndarray]) -> np.ndarray:
    """Attention mass on all vision tokens, ``[num_samples, num_layers]``, in [0, 1].

    Mass is no evidence of use: a trained backbone may park attention on background patches.
    """
    return np.stack([sample.sum(axis=1) for sample in checked_maps(maps)])


def layer_shift(maps: Iterable[np.ndarray]) -> np.ndarray:
    """Jensen-Shannon divergence between the vision distributions of neighbouring layers.

    Returns:
        ``[num_samples, num_layers - 1]``, bits, in [0, 1]. Entry ``g`` compares layers ``g`` and ``g + 1``:
        a change point ``l`` shows at gap ``l - 1``. NaN where either layer gave vision nothing: an empty
        layer has no distribution, so nothing can be said about its change.
    """
    rows = {}
    for place, sample in checked_in_any_order(maps):
        p = vision_distribution(sample)
        mid = (p[1:] + p[:-1]) / 2
        # JS = H(mid) - mean of the two H: two thirds of the textbook form's logarithms.
        entropy = _entropy(p)
        rows[place] = _entropy(mid) - (entropy[1:] + entropy[:-1]) / 2
    return np.clip(np.stack(by_place(rows)), 0.0, 1.0)


def top_token_curves(sample: np.ndarray, share: float = 0.1) -> np.ndarray:
    """Cumulative attention over layers of the tokens that get most of it in total.

    The curves of the AdaptInfer recipe (docs/methods.md): the ``share`` of tokens with most total
    attention, ``[num_top, num_layers]``, each non-decreasing. ``num_top`` is ``share`` of the tokens
    to the nearest whole one (58 of 576), at least 1. Tokens that got nothing at all are left out: a
    flat curve has no break.
    """
    total = sample.sum(axis=0)
    count = max(1, round(share * sample.shape[1]))
    top = np.argsort(-total, kind="stable")[:count]
    return np.cumsum(sample[:, top[total[top] > 0]].T, axis=1)


def _entropy(p: np.ndarray) -> np.ndarray:
    """Shannon entropy of the rows of ``p``, bits; NaN rows stay NaN."""
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis=-1)
