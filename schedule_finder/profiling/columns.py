"""Columns of a profile's tables: lists of numbers in Parquet and as arrays."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from schedule_finder.profiling.fields import CURVE_FIELDS, SCORE_FIELDS, ProfileRow

COUNTS = ("num_vision", "num_text_queries", "num_other")
COLUMNS = [
    "id",
    *COUNTS,
    *(column for name in SCORE_FIELDS for column in (name, f"{name}_max")),
    *CURVE_FIELDS,
]


SMALL_COLUMNS = [*COUNTS, *CURVE_FIELDS]
"""All but ids and scores."""


def table_of(ids: Sequence[str], rows: Sequence[ProfileRow]) -> pa.Table:
    """A shard: a row per sample."""
    columns: dict[str, Any] = {"id": pa.array(ids, pa.string())}
    for name in COUNTS:
        columns[name] = pa.array([getattr(row, name) for row in rows], pa.int32())
    for name in SCORE_FIELDS:
        largest = [np.maximum(row.scores[name].max(1), np.finfo(np.float32).tiny) for row in rows]
        fractions = [
            (row.scores[name] / top[:, None]).astype(np.float16).ravel()
            for row, top in zip(rows, largest, strict=True)
        ]
        columns[name] = list_column(fractions, pa.float16())
        columns[f"{name}_max"] = list_column(largest, pa.float32())
    for name in CURVE_FIELDS:
        columns[name] = list_column([row.curves[name] for row in rows], pa.float32())
    return pa.table(columns)


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
