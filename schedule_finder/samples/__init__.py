"""Step 1: a data set as people have it becomes seeded, numbered samples.

Which rows are for discovery and which are held out for evaluation is decided here, once, and written to
``1_samples.jsonl``: discovery never sees the samples that a schedule is judged on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from schedule_finder.samples.choose import Mixture, choose_samples
from schedule_finder.samples.demo import DemoData
from schedule_finder.samples.entries import (
    BadSample,
    DataSet,
    Sample,
    SampleEntry,
    Use,
    describe,
    read_entries,
    update_entries,
    write_entries,
)
from schedule_finder.samples.photo import PhotoData
from schedule_finder.samples.tables import DataOptions, TableData

__all__ = [
    "BadSample",
    "DataOptions",
    "DataSet",
    "DemoData",
    "Mixture",
    "PhotoData",
    "Sample",
    "SampleEntry",
    "TableData",
    "Use",
    "choose_samples",
    "describe",
    "open_data",
    "read_entries",
    "update_entries",
    "write_entries",
]

_GENERATED: dict[str, type[DemoData] | type[PhotoData]] = {"demo": DemoData, "photo": PhotoData}


def open_data(sources: str | Sequence[str], *, seed: int = 0, rows: int = 1000, **options: Any) -> DataSet:
    """The data set, or the mixture of several, that a command line names.

    Args:
        sources: each ``demo``, ``photo``, a preset, ``PRESET=FILE``, a local file or folder, or a hub name.
        seed: draws the samples of ``demo`` and ``photo``.
        rows: samples that will be asked for (streaming reads no more than it needs).
        options: `DataOptions`, for every source that is a table.

    Raises:
        InputError: there is no such data set, or it does not fit the options.
    """
    given = [sources] if isinstance(sources, str) else list(sources)
    parts: list[DataSet] = [
        _GENERATED[source](seed)
        if source in _GENERATED
        else TableData(source, DataOptions(**options), rows=rows)
        for source in given
    ]
    return parts[0] if len(parts) == 1 else Mixture(parts)
