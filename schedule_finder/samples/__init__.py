"""Step 1: from a data set to calibration samples and held-out samples.

The choice is seeded, made once, and written to ``1_samples.jsonl``. The search uses calibration samples only, the
evaluation held-out samples only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from schedule_finder.samples.choose import Mixture, choose_samples, in_turn, shortage
from schedule_finder.samples.demo import DemoData, DemoVideoData
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
from schedule_finder.samples.table_source import DataOptions
from schedule_finder.samples.tables import TableData

__all__ = [
    "BadSample",
    "DataOptions",
    "DataSet",
    "DemoData",
    "DemoVideoData",
    "Mixture",
    "PhotoData",
    "Sample",
    "SampleEntry",
    "TableData",
    "Use",
    "choose_samples",
    "describe",
    "in_turn",
    "open_data",
    "read_entries",
    "shortage",
    "update_entries",
    "write_entries",
]

_GENERATED: dict[str, type[DemoData] | type[PhotoData]] = {
    "demo": DemoData,
    "demo-video": DemoVideoData,
    "photo": PhotoData,
}


def open_data(sources: str | Sequence[str], *, seed: int = 0, rows: int = 1000, **options: Any) -> DataSet:
    """Open the data set of a command line, or the mixture of several.

    Args:
        sources: each ``demo``, ``demo-video``, ``photo``, a preset, ``PRESET=FILE``, a local file or folder, or a hub name.
        seed: draws the samples of ``demo``, ``demo-video`` and ``photo``.
        rows: number of samples that the run needs; it limits what streaming reads.
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
