"""Distances between layers, sample by sample.

The distance of two layers is the Bhattacharyya distance ``-log sum_v sqrt(p_v q_v)`` of their distributions over a
sample's vision tokens, in nats. Tokens of different samples have nothing to do with each other, so distances are
taken within a sample and averaged over samples. Independent noise on the attention logits adds to this distance
one term per layer and nothing else, however much the layers' noise differs (`noise_model`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from schedule_finder.signals import by_place, checked_in_any_order, spread

SMALLEST_AFFINITY = 1e-3
"""Distances end at 6.9 nats, so that one sample in which two layers share nothing does not decide the mean."""

MOST_PAIRS = 2**22
"""Distances that are held, 16 MB: those of 4096 samples of 32 layers. A mean over so many samples is known far better
than a change has to be."""
ALWAYS_READ = 1000
"""So many samples are read at any number of layers."""


@dataclass(frozen=True)
class LayerDistances:
    """Distances of every sample.

    Attributes:
        layers: the profile's rows with attention on vision tokens in at least one sample, ``[n]``.
        pairs: nats, ``[num_samples, n, n]``; 0 on the diagonal.
        to_uniform: distance of each layer to the uniform distribution, nats, ``[num_samples, n]``; None where
            there is no such reference, and then no isolated layers either.
        num_rows: rows of the profile.
    """

    layers: np.ndarray
    pairs: np.ndarray
    to_uniform: np.ndarray | None
    num_rows: int

    def __len__(self) -> int:
        return len(self.pairs)

    def mean(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Weighted means over samples of ``pairs`` and ``to_uniform``.

        Args:
            weights: ``[number, num_samples]``; by default one mean over all samples.

        Returns:
            ``[number, n, n]`` and ``[number, n]``.
        """
        if weights is None:
            weights = np.ones((1, len(self)))
        weights = weights / weights.sum(axis=1, keepdims=True)
        count, size = self.pairs.shape[:2]
        pairs = (weights @ self.pairs.reshape(count, -1)).reshape(-1, size, size)
        return pairs, None if self.to_uniform is None else weights @ self.to_uniform


def layer_distances(maps: Iterable[np.ndarray]) -> LayerDistances:
    """Distances of ``maps``, one ``[num_layers, num_vision]`` per sample; reads one sample at a time.

    Of many samples some, evenly spread, so that no more than `MOST_PAIRS` distances are held.

    A layer without attention on vision tokens in one sample takes the distribution of the last layer that has
    some (before the first: of the first), so that a missing layer is no change. Raises `ValueError`.
    """
    if isinstance(maps, Sequence) and len(maps):
        maps = spread(maps, _most_samples(len(maps[0])))
    pairs, uniform = {}, {}
    seen: np.ndarray | None = None
    num_rows = 0
    for place, sample in checked_in_any_order(maps):
        num_rows = len(sample)
        present = sample.sum(axis=1) > 0
        seen = present if seen is None else seen | present
        if present.any():
            pairs[place], uniform[place] = _sample_distances(sample, present)
    assert seen is not None
    layers = np.flatnonzero(seen)
    size = len(layers)
    if not pairs:
        return LayerDistances(layers, np.zeros((0, size, size)), np.zeros((0, size)), num_rows)
    of_pairs, of_uniform = np.stack(by_place(pairs)), np.stack(by_place(uniform))
    if size < num_rows:
        of_pairs, of_uniform = of_pairs[:, layers[:, None], layers], of_uniform[:, layers]
    return LayerDistances(layers, of_pairs, of_uniform, num_rows)


def curve_distances(curve: np.ndarray) -> LayerDistances:
    """Squared differences of one number per layer, ``[num_samples, num_layers]``; of as many samples at most."""
    values = np.asarray(curve, dtype=np.float64)
    values = values[:: max(1, -(-len(values) // _most_samples(values.shape[1])))]
    pairs = (values[:, :, None] - values[:, None]) ** 2
    return LayerDistances(np.arange(values.shape[1]), pairs, None, values.shape[1])


def _most_samples(num_layers: int) -> int:
    return max(ALWAYS_READ, MOST_PAIRS // max(num_layers, 1) ** 2)


def _sample_distances(sample: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.flatnonzero(present)
    source = rows[np.maximum(np.searchsorted(rows, np.arange(len(sample)), side="right") - 1, 0)]
    mass = sample.sum(axis=1)
    root = np.sqrt(sample[source] / mass[source, None]).astype(np.float32)
    # Not `@`: a thousand small products make BLAS threads fight over a busy machine (0.3 s became 23 s).
    affinity = np.einsum("lv,mv->lm", root, root)
    pairs = -np.log(np.clip(affinity, SMALLEST_AFFINITY, 1.0))
    np.fill_diagonal(pairs, 0.0)
    flat = root.sum(axis=1) / np.sqrt(sample.shape[1])
    return pairs, -np.log(np.clip(flat, SMALLEST_AFFINITY, 1.0))
