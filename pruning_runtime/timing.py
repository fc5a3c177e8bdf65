"""Milliseconds by part of a run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Sums milliseconds by part. On CUDA it records events, which only `sums` waits for."""

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self._enabled = enabled
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._sums: dict[str, float] = defaultdict(float)
        self._open: dict[str, Any] = {}

    def start(self, part: str) -> None:
        """Begin timing ``part``."""
        if self._enabled:
            self._open[part] = self._now()

    def stop(self, part: str) -> None:
        """End timing ``part``; nothing happens without a `start`."""
        if (begun := self._open.pop(part, None)) is not None:
            self._spans.append((part, begun, self._now()))

    @contextmanager
    def part(self, part: str) -> Iterator[None]:
        """Time the body of a ``with`` as ``part``."""
        self.start(part)
        try:
            yield
        finally:
            self.stop(part)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time nothing in the body of a ``with``."""
        enabled, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = enabled

    def sums(self) -> dict[str, float]:
        """Milliseconds by part so far; waits for the device."""
        for part, begun, ended in self._spans:
            if self._cuda:
                ended.synchronize()
            self._sums[part] += begun.elapsed_time(ended) if self._cuda else 1e3 * (ended - begun)
        self._spans.clear()
        return dict(self._sums)

    def _now(self) -> Any:
        """The time now: seconds, or an event on the current CUDA stream."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
