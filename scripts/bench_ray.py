"""Benches in a process of their own, which is replaced when one of them takes it down.

An error in a CUDA kernel ends what a process can do with the device; one that hangs ends more. So nothing here
imports torch, and what does runs elsewhere.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

SILENCE_SECONDS = 60.0
"""On a GPU one run takes seconds, and so do imports and building the largest backbone."""
SPARE_SECONDS = 20.0
"""What a bench takes beyond its own seconds: building the backbone, its first rounds."""
NO_TIME = "no time left"


@dataclass(frozen=True)
class Job:
    """One bench."""

    backbone: str
    batch: int
    lengths: tuple[int, ...]
    seconds: float
    without: tuple[str, ...] = ()


@dataclass
class Crew:
    """Runs jobs in a process that is replaced when it fails.

    Args:
        work: what the process does: called with its end of a pipe and ``arguments``, it receives jobs and answers each
            with ``("running", baseline)`` as one begins, and at last with ``("done", document)`` or ``("failed",
            reason)``, after which it is replaced.
        arguments: for ``work``.
        needed: baselines without which there is no bench.
        until: by `time.monotonic`; then the process is ended, whatever it does.
        silence: seconds without a word after which it is ended, too.
    """

    work: Callable[..., None]
    arguments: tuple[Any, ...]
    needed: Sequence[str]
    until: float
    silence: float
    failed: list[dict[str, Any]] = field(default_factory=list)
    """What failed: ``backbone``, ``batch``, ``reason``, and ``baseline`` where it was one of several."""
    _without: tuple[str, ...] = ()
    _process: Any = None
    _jobs: Any = None

    def documents(self, plan: Sequence[Job]) -> Iterator[dict[str, Any]]:
        """Run ``plan``; yields a document for each bench that was measured."""
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
            kind, said, running = self._ask(job)
            if kind == "done":
                return said
            self._end()
            if kind == "late":
                self._note(job, NO_TIME)
                return None
            if running is None or running in self.needed:
                self._note(job, said)
                return None
            self._note(job, f"{said}; left out from here on", baseline=running)
            self._without += (running,)

    def _ask(self, job: Job) -> tuple[str, Any, str | None]:
        """``done``, ``failed`` or ``late``; the document or the reason; which baseline ran last."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
            self._jobs, theirs = context.Pipe()
            self._process = context.Process(target=self.work, args=(theirs, *self.arguments), daemon=True)
            self._process.start()
            theirs.close()
        running = None
        try:
            self._jobs.send(replace(job, without=job.without + self._without))
            while self._jobs.poll(max(0.0, min(self.silence, self.until - time.monotonic()))):
                kind, said = self._jobs.recv()
                if kind != "running":
                    return kind, said, running
                running = said
        except (EOFError, ConnectionError):
            self._process.join(self.silence)
            return "failed", f"the process ended with code {self._process.exitcode}", running
        kind = "late" if time.monotonic() >= self.until else "failed"
        return kind, f"no word for {self.silence:.0f} s", running

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(self.silence)  # a driver may keep hold of it for a while
            self._jobs.close()
            self._process = None

    def _note(self, job: Job, reason: str, **more: str) -> None:
        self.failed.append({"backbone": job.backbone, "batch": job.batch, **more, "reason": reason})
