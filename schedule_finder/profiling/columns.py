"""Columns of a profile's tables: lists of numbers in Parquet and as arrays."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def list_column(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    """Arrays of any length as one column of lists."""
    offsets = np.concatenate([[0], np.cumsum([array.size for array in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(arrays), kind))


def rows_by_id(ids: list[str]) -> np.ndarray:
    """Rows by id, each id once: shards may come from several machines, and the result is the same everywhere."""
    return np.array(sorted(dict(zip(ids, range(len(ids)), strict=True)).values(), key=ids.__getitem__))


def score_arrays(table: pa.Table, name: str) -> list[np.ndarray]:
    """One score of each row, ``[layers, num_vision]`` float32."""
    fractions, largest = arrays_of(table[name]), arrays_of(table[f"{name}_max"])
    return [
        part.astype(np.float32).reshape(len(most), -1) * most[:, None]
        for part, most in zip(fractions, largest, strict=True)
    ]


def arrays_of(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The lists of a column as flat arrays, row by row."""
    arrays: list[np.ndarray] = []
    for chunk in column.chunks:
        values = chunk.flatten().to_numpy(zero_copy_only=False)
        offsets = chunk.offsets.to_numpy() - chunk.offsets[0].as_py()
        arrays += [values[a:b] for a, b in itertools.pairwise(offsets)]
    return arrays
