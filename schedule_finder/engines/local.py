"""The engine of one process: one backbone, on one device or spread over several."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

from schedule_finder.backbones import LoadedBackbone
from schedule_finder.engines.base import BatchLimits, Piece, Report, Window, describe_backbone
from schedule_finder.engines.worker import Worker
from schedule_finder.samples import DataSet


class LocalEngine:
    """Runs windows one after the other in this process."""

    def __init__(self, loaded: LoadedBackbone, data: DataSet, limits: BatchLimits) -> None:
        self.loaded: LoadedBackbone | None = loaded
        self.meta = describe_backbone(loaded)
        self.place = str(loaded.device)
        self._worker = functools.partial(Worker, loaded, data, limits)

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def profile(self, windows: Iterable[Window], report: Report) -> Iterator[Piece]:
        """Windows in their order; a piece per batch."""
        worker = self._worker(report)
        for window in windows:
            for outcomes in worker.profile(window):
                yield Piece(outcomes)
            yield Piece(last=True)
