"""Attention maps whose regimes are known, without a model: for tests of detectors that take milliseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

NUM_VISION = 40


def planted_maps(
    num_layers: int,
    boundaries: tuple[int, ...],
    *,
    noise: float | Sequence[float] = 0.5,
    drift: float = 0.0,
    isolated: Sequence[int] = (),
    groups: Sequence[int] | None = None,
    num_samples: int = 10,
    seed: int = 0,
) -> list[np.ndarray]:
    """Softmax maps ``[num_layers, NUM_VISION]``: 3 nats on one group of tokens per regime.

    Args: as of `tests.support.planted.planted_llava`; ``noise`` and ``drift`` in nats on the logits.
    """
    rng = np.random.default_rng(seed)
    of_regime = np.arange(len(boundaries) + 1) if groups is None else np.asarray(groups)
    group = of_regime[np.searchsorted(boundaries, np.arange(num_layers), side="right")]
    group[list(isolated)] = of_regime.max() + 1 + np.arange(len(isolated))
    level = np.broadcast_to(np.asarray(noise, dtype=float), (num_layers,))[:, None]
    own = level * rng.standard_normal((num_layers, NUM_VISION))  # shared by the samples, as weights are
    walk = np.cumsum(drift * rng.standard_normal((num_layers, NUM_VISION)), axis=0)
    maps = []
    for _ in range(num_samples):
        of_token = rng.permutation(NUM_VISION) % (group.max() + 2)
        logits = 3.0 * (of_token == group[:, None]) + own + walk
        logits += 0.3 * level * rng.standard_normal(logits.shape)
        mass = np.exp(logits)
        maps.append(rng.uniform(0.2, 0.9) * mass / mass.sum(axis=1, keepdims=True))
    return maps
