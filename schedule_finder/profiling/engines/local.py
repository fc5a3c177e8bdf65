"""The engine of one process: one backbone, on one device or spread over several."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.profiling.engines.base import (
    BatchLimits,
    BatchResult,
    Report,
    SampleChunk,
    describe_backbone,
)
from schedule_finder.profiling.engines.worker import Worker
from schedule_finder.samples import DataSet


class LocalEngine:
    """Runs chunks one after the other in this process."""

    def __init__(self, loaded: LoadedBackbone, data: DataSet, limits: BatchLimits) -> None:
        self.loaded: LoadedBackbone | None = loaded
        self.meta = describe_backbone(loaded, limits)
        self.place = str(loaded.device)
        self._worker = functools.partial(Worker, loaded, data, limits)

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def profile(self, chunks: Iterable[SampleChunk], report: Report) -> Iterator[BatchResult]:
        """Chunks in their order; a result per batch."""
        worker = self._worker(report)
        for chunk in chunks:
            for outcomes in worker.profile(chunk):
                yield BatchResult(outcomes)
            yield BatchResult(last=True)
