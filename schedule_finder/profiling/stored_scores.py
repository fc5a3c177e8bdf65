"""Scores of a profile that are read from its shards when they are asked for, so that a profile may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from schedule_finder.signals import by_place

Read = Callable[[Path], list[np.ndarray]]


class StoredScores(Sequence[np.ndarray]):
    """One score of the samples of a profile, float32 ``[layers, num_vision]`` each, by place in the order of ids.

    One shard is held at a time, so consecutive places are cheap only where they are in one shard; `in_any_order` is
    cheap always.

    Args:
        read: the score of all samples in a shard, in the shard's order. Raises `StoreError`.
        places: shard and row of every sample.
    """

    def __init__(self, read: Read, places: Sequence[tuple[Path, int]]) -> None:
        self._read = read
        self._places = list(places)
        self._held: tuple[Path, list[np.ndarray]] | None = None

    def __len__(self) -> int:
        return len(self._places)

    # ---- as a sequence

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> StoredScores: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return StoredScores(self._read, self._places[index])
        path, row = self._places[index]
        if self._held is None or self._held[0] != path:
            self._held = path, self._read(path)
        return self._held[1][row]

    def some(self, indices: Sequence[int] | np.ndarray) -> StoredScores:
        """Those of some samples, by index."""
        return StoredScores(self._read, [self._places[index] for index in indices])

    def spread(self, most: int) -> StoredScores:
        """Those of whole shards, evenly spread over all, with ``most`` samples or less if shards are equally large."""
        if len(self) <= most:
            return self
        shards = sorted({path for path, _ in self._places})
        number = max(1, most * len(shards) // len(self))
        read = {shards[int(index)] for index in np.linspace(0, len(shards) - 1, number)}
        return StoredScores(self._read, [place for place in self._places if place[0] in read])

    def in_any_order(self) -> Iterator[tuple[int, np.ndarray]]:
        """Every sample with its place, shard by shard."""
        by_shard: dict[Path, list[tuple[int, int]]] = {}
        for place, (path, row) in enumerate(self._places):
            by_shard.setdefault(path, []).append((place, row))
        for path, some in sorted(by_shard.items()):
            samples = self._read(path)
            for place, row in some:
                yield place, samples[row]

    def __iter__(self) -> Iterator[np.ndarray]:
        """The samples by place; holds a shard from its first to its last sample."""
        last = {path: place for place, (path, _) in enumerate(self._places)}
        held: dict[Path, list[np.ndarray]] = {}
        for place, (path, row) in enumerate(self._places):
            if path not in held:
                held[path] = self._read(path)
            yield held[path][row]
            if last[path] == place:
                del held[path]


def chosen(scores: Sequence[np.ndarray], indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Some of the scores, by index, in memory."""
    if not isinstance(scores, StoredScores):
        return [scores[index] for index in indices]
    return by_place(dict(scores.some(indices).in_any_order()))
