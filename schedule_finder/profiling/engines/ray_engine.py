"""The engine of many GPUs and machines: one worker per GPU on a Ray cluster.

Workers are Ray actors in an `ActorPool`: the next free worker takes the next chunk. Ray restarts an actor that
died (``max_restarts``) and repeats its chunk (``max_task_retries``). Ray Data would need more set-up for the same:
conversion to blocks and back, its own executor and progress bars. Workers send rows to the driver, the only
writer, so the store needs no lock.
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
"""How often a chunk is repeated when its worker dies."""


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker loads backbone and data; the functions are sent to its machine.

    Attributes:
        load: loads the backbone; its paths must exist on every machine.
        open_data: opens the data set; likewise.
        limits: limits of its batches.
        threads: CPU threads of a worker.
        gpus: GPUs of a worker where the cluster has any, 0 for none; None divides them all among the workers.
    """

    load: Callable[[], LoadedBackbone]
    open_data: Callable[[], DataSet]
    limits: BatchLimits
    threads: int = 1
    gpus: int | None = 1


class _RayWorker:
    """The code of an actor. It loads at the first call, since errors of a constructor are not reported."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._notes: list[str] = []
        self._worker: Worker | None = None

    def meta(self) -> dict[str, Any]:
        return describe_backbone(self._load().loaded, self._settings.limits)

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
    """Workers on the Ray cluster of ``RAY_ADDRESS``, else a local one that runs, else one that is started.

    Args:
        settings: how every worker loads.
        workers: how many; default one per GPU, or one on a cluster without GPUs.

    Raises:
        InputError: ray is missing, or the cluster lacks the GPUs or processors.
    """

    def __init__(self, settings: WorkerSettings, workers: int | None = None) -> None:
        try:
            # No usage statistics unless the user asks for them.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            import ray
        except ImportError:
            raise InputError("--engine ray needs ray: pip install 'adaptinfer[ray]'") from None
        if not ray.is_initialized():
            ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU", 0) and settings.gpus != 0 else "CPU"
        units = int(resources.get(kind, 0))
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
            # Of all workers: loading errors appear before the run is begun.
            self.meta = ray.get([worker.meta.remote() for worker in self._workers])[0]
        except ray.exceptions.RayError as error:
            self.__exit__()
            raise _explained(error) from error

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *error: object) -> None:
        """End the workers, which releases their GPUs."""
        for worker in self._workers:
            self._ray.kill(worker)

    def profile(self, chunks: Iterable[SampleChunk], report: Report) -> Iterator[BatchResult]:
        """One result per chunk, in the order in which they finish."""
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
    """The cause of a worker's error, without Ray's traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return cause
    return RuntimeError(
        f"a Ray worker died {RETRIES + 1} times on the same {CHUNK_SIZE} samples ({type(error).__name__}); finished "
        "samples are kept: see the worker's log below /tmp/ray, and run the same command again"
    )
