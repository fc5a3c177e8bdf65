"""Slow float64 references of the rules that read the vision tower: one image, lists and loops, none of the product's code.

Tokens are numbered row by row. Every reference returns the kept tokens in order; rules that merge also return, for each
token that is dropped, the kept one that it joins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Image:
    """Statistics of the tokens of one image of ``rows`` x ``columns`` tokens."""

    rows: int
    columns: int
    saliency: dict[str, np.ndarray]
    states: np.ndarray
    keys: np.ndarray
    features: np.ndarray
    has_cls: bool

    @property
    def number(self) -> int:
        return self.rows * self.columns


def best(values: np.ndarray, among: list[int], count: int) -> list[int]:
    """The ``count`` tokens of highest value; ties to the lowest number."""
    return sorted(among, key=lambda token: (-values[token], token))[:count]


def cosines(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    result = np.zeros((len(vectors), len(vectors)))
    for i, one in enumerate(vectors):
        for j, other in enumerate(vectors):
            length = math.sqrt(one @ one) * math.sqrt(other @ other)
            result[i, j] = one @ other / length if length else 0.0
    return result


def fastervlm(image: Image, k: int) -> list[int]:
    return sorted(best(image.saliency["deep"], list(range(image.number)), k))


def hiprune(image: Image, k: int, alpha: float = 0.1) -> list[int]:
    everything = list(range(image.number))
    kept = best(image.saliency["middle_received"], everything, min(round(k * alpha / 5), k))
    deep = image.saliency["deep_received"]
    beside = set()
    for token in kept:
        row, column = divmod(token, image.columns)
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= r < image.rows and 0 <= c < image.columns:
                beside.add(r * image.columns + c)
    for pool in (sorted(beside), everything):
        kept += best(deep, [token for token in pool if token not in kept], k - len(kept))
    return sorted(kept)


def visionzip(image: Image, k: int) -> tuple[list[int], dict[int, int]]:
    k = min(k, image.number)
    contextual = round(k * 10 / 64)
    dominant = best(image.saliency["deep"], list(range(image.number)), k - contextual)
    rest = [token for token in range(image.number) if token not in dominant]
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = rest[::step][:contextual]
    similar = cosines(image.keys)
    joins = {}
    for token in rest:
        if token not in targets and targets:
            joins[token] = max(targets, key=lambda target: (similar[token, target], -target))
    return sorted(dominant + targets), joins


def scope(image: Image, k: int) -> list[int]:
    similar = cosines(image.states)
    covered, kept = np.zeros(image.number), []
    for _ in range(min(k, image.number)):
        gains = {}
        for token in range(image.number):
            if token not in kept:
                gained = np.maximum(similar[token] - covered, 0).sum()
                gains[token] = gained * float(image.saliency["deep"][token])
        kept.append(max(gains, key=lambda token: (gains[token], -token)))
        covered = np.maximum(covered, similar[kept[-1]])
    return sorted(kept)


def vscan(image: Image, k: int) -> tuple[list[int], dict[int, int]]:
    k = min(k, image.number)
    edge = 6 if image.has_cls else 4
    windows: dict[tuple[int, int], list[int]] = {}
    for token in range(image.number):
        row, column = divmod(token, image.columns)
        last_row, last_column = max(image.rows // edge, 1) - 1, max(image.columns // edge, 1) - 1
        windows.setdefault((min(row // edge, last_row), min(column // edge, last_column)), []).append(token)
    half = k // 2
    each = half // len(windows) if image.has_cls else -(-half // len(windows))
    shallow, deep = image.saliency["shallow"], image.saliency["deep"]
    local = best(
        shallow, [token for window in windows.values() for token in best(shallow, window, each)], half
    )
    rest = [token for token in range(image.number) if token not in local]
    kept = sorted(local + best(deep, rest, k - len(local)))
    similar = cosines(image.features)
    joins = {
        token: max(kept, key=lambda target: (similar[token, target], -target))
        for token in range(image.number)
        if token not in kept and kept
    }
    return kept, joins
