"""The engine of many GPUs and machines: one worker per GPU on a Ray cluster.

Workers are Ray actors in an `ActorPool`, a queue from which whichever is free takes the next chunk. Ray
itself restarts an actor that died (``max_restarts``) and gives it its chunk again (``max_task_retries``);
a Ray Data set would do the same for more set-up: rows to blocks and back, and its own executor and progress
bars. Only the driver writes: workers send rows back, so there is one store and nothing to lock.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from schedule_finder.errors import InputError
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.profiling.engines.base import (
    CHUNK_SIZE,
    BatchLimits,
    BatchResult,
    Outcome,
    Report,
    SampleChunk,
    describe_backbone,
)
from schedule_finder.profiling.engines.worker import Worker
from schedule_finder.samples import DataSet

RETRIES = 2
"""How often a chunk is done again when the worker that did it dies."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker does first, wherever it is: the two functions travel there.

    Attributes:
        load: loads the backbone; paths in it must be good on every machine.
        open_data: opens the data set; likewise.
        limits: of its batches.
        threads: CPU threads of a worker.
        gpus: GPUs of a worker where the cluster has any, 0 for none; None divides them all among the workers.
    """

    load: Callable[[], LoadedBackbone]
    open_data: Callable[[], DataSet]
    limits: BatchLimits
    threads: int = 1
    gpus: int | None = 1


class _RayWorker:
    """What runs inside an actor. It loads at its first call: a constructor's errors reach nobody."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._notes: list[str] = []
        self._worker: Worker | None = None

    def meta(self) -> dict[str, Any]:
        return describe_backbone(self._load().loaded)

    def profile(self, chunk: SampleChunk) -> tuple[list[Outcome], list[str]]:
        outcomes = [outcome for some in self._load().profile(chunk) for outcome in some]
        notes, self._notes[:] = list(self._notes), []
        return outcomes, notes

    def _load(self) -> Worker:
        if self._worker is None:
            import torch

            ours = self._settings
            torch.set_num_threads(ours.threads)
            self._worker = Worker(ours.load(), ours.open_data(), ours.limits, self._notes.append)
        return self._worker


class RayEngine:
    """Workers on the Ray cluster that ``RAY_ADDRESS`` names or that runs here, else on one of its own.

    Args:
        settings: what every worker does first.
        workers: how many; default one per GPU, or one on a cluster without GPUs.

    Raises:
        InputError: ray is missing, or the cluster lacks the GPUs or processors.
    """

    def __init__(self, settings: WorkerSettings, workers: int | None = None) -> None:
        try:
            # Nothing is sent anywhere unless the user asks for it.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            import ray
        except ImportError:
            raise InputError("--engine ray needs ray: pip install 'adaptinfer[ray]'") from None
        if not ray.is_initialized():
            ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
        there = ray.cluster_resources()
        kind = "GPU" if there.get("GPU", 0) and settings.gpus != 0 else "CPU"
        units = int(there.get(kind, 0))
        if kind == "CPU":
            count, each = workers or 1, settings.threads
        elif settings.gpus:
            count, each = workers or units // settings.gpus, settings.gpus
        else:
            count = workers or 1
            each = max(1, units // count)
        if count * each > units:
            raise InputError(
                f"--workers {count}: each needs {each} {kind}, and the Ray cluster has {units}; ask for fewer"
            )
        needed = {"num_gpus": each} if kind == "GPU" else {"num_cpus": each}
        self._ray = ray
        self.loaded: LoadedBackbone | None = None
        self.place = f"{count} Ray worker(s) of {each} {kind} each"
        actor = ray.remote(_RayWorker).options(max_restarts=-1, max_task_retries=RETRIES, **needed)
        self._workers: list[Any] = [actor.remote(settings) for _ in range(count)]
        try:
            # Of all of them: each has loaded, or says what is wrong, before a run is begun.
            self.meta = ray.get([worker.meta.remote() for worker in self._workers])[0]
        except ray.exceptions.RayError as error:
            self.__exit__()
            raise _explained(error) from error

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *error: object) -> None:
        """Give the workers' GPUs back."""
        for worker in self._workers:
            self._ray.kill(worker)

    def profile(self, chunks: Iterable[SampleChunk], report: Report) -> Iterator[BatchResult]:
        """Chunks as they are finished, one result each."""
        pool = self._ray.util.ActorPool(self._workers)
        try:
            for outcomes, notes in pool.map_unordered(_profile_remotely, list(chunks)):
                for note in notes:
                    report(note)
                yield BatchResult(outcomes, last=True)
        except self._ray.exceptions.RayError as error:
            raise _explained(error) from error


def _profile_remotely(worker: Any, chunk: SampleChunk) -> Any:
    return worker.profile.remote(chunk)


def _explained(error: Any) -> Exception:
    """What went wrong in a worker, without Ray's account of where."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return cause
    return RuntimeError(
        f"a Ray worker died {RETRIES + 1} times on the same {CHUNK_SIZE} samples ({type(error).__name__}); what was done "
        "before is kept: look at the worker's log below /tmp/ray, and give the same command again"
    )
