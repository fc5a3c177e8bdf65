"""Small profiles and decoders for solvers to work on."""

from __future__ import annotations

import numpy as np

from pruning_runtime.geometry import DecoderShape
from schedule_finder.measuring.answer_kl import TokenPolicy
from schedule_finder.profiling.capture import CURVE_FIELDS, SCORE_FIELDS
from schedule_finder.profiling.store import Profile

KINDS = ("processed", "published", "flops", "kv")
POLICY = TokenPolicy("text_guided")


def shape_of(layers: int) -> DecoderShape:
    """A small decoder of so many layers."""
    return DecoderShape(layers, 64, 4, 2, 16, 128, 1000)


def profile_of(maps: list[np.ndarray], scores: list[np.ndarray] | None = None) -> Profile:
    """A profile whose every score field is ``scores`` (default the maps themselves)."""
    layers = maps[0].shape[0]
    count = len(maps)
    fields = dict.fromkeys(SCORE_FIELDS, scores or maps) | {"uniform_text": maps}
    return Profile(
        meta={"backbone": {"num_layers": layers}, "layers": list(range(layers))},
        ids=[f"{i:03d}" for i in range(count)],
        counts={
            "num_vision": np.array([sample.shape[1] for sample in maps]),
            "num_text_queries": np.full(count, 5),
            "num_other": np.full(count, 8),
        },
        scores=fields,
        curves={name: np.zeros((count, layers)) for name in CURVE_FIELDS},
    )


def random_profile(layers: int, seed: int, samples: int = 6, missing: set[int] = frozenset()) -> Profile:
    """Random attention and scores; ``missing``: decoder layers without attention, which have no row."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(8, 30, samples)
    present = [layer for layer in range(layers) if layer not in missing]
    profile = profile_of(
        [rng.dirichlet(np.full(size, 0.3), layers).astype(np.float32)[present] for size in sizes],
        [rng.random((layers, size)).astype(np.float32)[present] for size in sizes],
    )
    profile.meta |= {"backbone": {"num_layers": layers}, "layers": present}
    return profile
