"""Runs benchmarks in a second process and replaces the process after a failure.

After an error in a CUDA kernel a process cannot use the device any more, and a kernel may hang. This module does not
import torch; the second process does.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

TIMEOUT_SECONDS = 60.0
"""Longest time without a message: on a GPU a run, the imports and building a backbone each take seconds."""
SPARE_SECONDS = 20.0
"""Time of a benchmark beyond its own limit: building the backbone and the first rounds."""
NO_TIME = "no time left"


@dataclass(frozen=True)
class Job:
    """One benchmark."""

    backbone: str
    batch: int
    lengths: tuple[int, ...]
    seconds: float
    without: tuple[str, ...] = ()


@dataclass
class BenchProcess:
    """Runs jobs in a second process, which is replaced when it fails.

    Args:
        work: function of the second process, called with its end of a pipe and ``arguments``. It receives jobs and sends
            ``("running", baseline)`` before each baseline, and then ``("done", document)`` or ``("failed", reason)``.
            After a failure the process is replaced.
        arguments: for ``work``.
        needed: baselines without which a benchmark has no result.
        until: time by `time.monotonic` at which the process is ended.
        timeout: seconds without a message after which the process is ended.
    """

    work: Callable[..., None]
    arguments: tuple[Any, ...]
    needed: Sequence[str]
    until: float
    timeout: float
    failed: list[dict[str, Any]] = field(default_factory=list)
    """Failures: ``backbone``, ``batch``, ``reason``, and ``baseline`` if only that one failed."""
    _without: tuple[str, ...] = ()
    _process: Any = None
    _jobs: Any = None

    def documents(self, plan: Sequence[Job]) -> Iterator[dict[str, Any]]:
        """Run ``plan``; yields a document per finished benchmark."""
        for job in plan:
            document = self._document(job)
            if document is not None:
                self.failed += [{"backbone": job.backbone, **one} for one in document["failed"]]
                yield document
        self._end()

    def _document(self, job: Job) -> dict[str, Any] | None:
        while True:
            if time.monotonic() + job.seconds + SPARE_SECONDS > self.until:
                self._note(job, NO_TIME)
                return None
            kind, result, running = self._ask(job)
            if kind == "done":
                return result
            self._end()
            if kind == "late":
                self._note(job, NO_TIME)
                return None
            if running is None or running in self.needed:
                self._note(job, result)
                return None
            self._note(job, f"{result}; left out from here on", baseline=running)
            self._without += (running,)

    def _ask(self, job: Job) -> tuple[str, Any, str | None]:
        """``done``, ``failed`` or ``late``; the document or the reason; the baseline that ran last."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
            self._jobs, theirs = context.Pipe()
            self._process = context.Process(target=self.work, args=(theirs, *self.arguments), daemon=True)
            self._process.start()
            theirs.close()
        running = None
        try:
            self._jobs.send(replace(job, without=job.without + self._without))
            while self._jobs.poll(max(0.0, min(self.timeout, self.until - time.monotonic()))):
                kind, content = self._jobs.recv()
                if kind != "running":
                    return kind, content, running
                running = content
        except (EOFError, ConnectionError):
            self._process.join(self.timeout)
            return "failed", f"the process ended with code {self._process.exitcode}", running
        kind = "late" if time.monotonic() >= self.until else "failed"
        return kind, f"no message for {self.timeout:.0f} s", running

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(self.timeout)  # a driver may delay its end
            self._jobs.close()
            self._process = None

    def _note(self, job: Job, reason: str, **more: str) -> None:
        self.failed.append({"backbone": job.backbone, "batch": job.batch, **more, "reason": reason})
