"""Seeded random draws of the demo data sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

Split = Literal["train", "calibration", "held_out"]
_T = TypeVar("_T")


def scene_rng(split: Split, seed: int, number: int) -> np.random.Generator:
    """A generator for one scene; different arguments, splits among them, never share a stream."""
    splits = get_args(Split)
    if split not in splits:
        raise ValueError(f"split: {split!r} is not one of {splits}")
    # Three 32-bit words each: without the bound, a large seed could spill into the words of another key.
    for name, value in (("seed", seed), ("number", number)):
        if not 0 <= value < 2**32:
            raise ValueError(f"{name}: {value} is not in 0 ... 2**32 - 1")
    return np.random.default_rng([splits.index(split), seed, number])


def pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]
