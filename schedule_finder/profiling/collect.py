"""Step 2's loop: results of an engine into the store and the list of samples, safe against a kill at any moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from schedule_finder.profiling.engines.base import BatchResult, Engine, Report, cut_chunks
from schedule_finder.profiling.fields import ProfileRow
from schedule_finder.profiling.store import ProfileStore
from schedule_finder.samples import SampleEntry, update_entries
from schedule_finder.samples.skipping import check_skipped

FLUSH_SECONDS = 60
"""What a killed process can lose at most, where a chunk of samples takes longer."""


@dataclass
class Collection:
    """The calibration samples of a run on their way into its profile.

    Attributes:
        path: the list of samples, ``1_samples.jsonl``.
        entries: its content; changed in place.
        store: the profile; opened.
        stored: ids of the samples that it holds.
        progress: called with the samples done and all samples.
        max_skipped: share of the samples that may be unusable.
        after_shard: called with the store at the start and after each chunk; True ends the collection.
    """

    path: Path
    entries: list[SampleEntry]
    store: ProfileStore
    stored: set[str]
    progress: Callable[[int, int], None]
    max_skipped: float
    after_shard: Callable[[ProfileStore], bool] | None = None
    _changed: list[SampleEntry] = field(default_factory=list)
    _rows: dict[str, ProfileRow] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._index = {
            entry.id: index for index, entry in enumerate(self.entries) if entry.use == "calibration"
        }
        calibration = [self.entries[index] for index in self._index.values()]
        self._pending = frozenset(
            entry.id
            for entry in calibration
            if entry.status == "pending" or (entry.status == "done" and entry.id not in self.stored)
        )
        self._left = len(self._pending)
        self._skipped = [entry for entry in calibration if entry.status == "skipped"]

    def run(self, engine: Engine, report: Report) -> None:
        """Profile what is pending. Raises `InputError` where too many samples cannot be used."""
        self._check()
        self.progress(len(self._index) - self._left, len(self._index))
        if self._enough():
            return
        chunks = cut_chunks([self.entries[index] for index in self._index.values()], self._pending)
        flushed = time.monotonic()
        try:
            for result in engine.profile(chunks, report):
                self._take(result)
                if result.last or time.monotonic() - flushed > FLUSH_SECONDS:
                    self._flush()
                    flushed = time.monotonic()
                if result.last:
                    self._check()
                    if self._enough():
                        break
        finally:
            self._flush()

    def _take(self, result: BatchResult) -> None:
        for outcome in result.outcomes:
            entry = self.entries[self._index[outcome.entry.id]] = outcome.entry
            self._changed.append(entry)
            if outcome.row is None:
                self._skipped.append(entry)
            elif entry.id not in self.stored:
                self._rows[entry.id] = outcome.row
        self._left -= len(result.outcomes)
        self.progress(len(self._index) - self._left, len(self._index))

    def _flush(self) -> None:
        # Notes before rows: a sample that is noted as done but not stored is done again.
        if self._changed:
            update_entries(self.path, self._changed)
        self.store.append(list(self._rows), list(self._rows.values()))
        self._changed.clear()
        self._rows.clear()

    def _check(self) -> None:
        check_skipped(self._skipped, len(self._index) - self._left, len(self._index), self.max_skipped)

    def _enough(self) -> bool:
        return self.after_shard is not None and self.after_shard(self.store)
