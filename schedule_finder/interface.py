"""The Python interface: the steps of `adaptinfer-profile` on a run folder, with tables as DataFrames.

A run made here and one made by the command line are the same files; each continues the other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pruning_runtime.schedule import BudgetKind, Schedule
from schedule_finder.errors import InputError
from schedule_finder.opened_run import Progress, Run, log, silent
from schedule_finder.run.folder import Run as RunFolder
from schedule_finder.run.output_folder import check_folder, check_not_among_data
from schedule_finder.run.schema import RUN_OPTIONS, missing_fields

__all__ = ["Run", "find_schedule", "load_run", "profile"]


def load_run(folder: str | os.PathLike[str], *, device: str = "auto", dtype: str = "auto") -> Run:
    """The run in ``folder``, made here or by the command line.

    Args:
        folder: of the run.
        device: for steps that need the backbone, which is loaded when the first of them runs.
        dtype: of the backbone; ``auto`` is float32 on a CPU.

    Raises:
        InputError: there is no run.
    """
    files = RunFolder(Path(folder))
    if (problem := missing_fields(files.options, RUN_OPTIONS)) is not None:
        raise InputError(f"{files.path}: options: {problem}; restore it or begin a new run")
    return Run(files, device, dtype)


_ALWAYS_STORED = ("split", "image_column", "question_column", "answer_column")
"""Options of a table that every run folder names, whether they were given or not."""


def profile(
    backbone: str,
    dataset: str | Sequence[str] | None = None,
    *,
    out: str | os.PathLike[str],
    samples: int = 1000,
    eval_samples: int = 450,
    seed: int = 0,
    batch_size: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = silent,
    **columns: Any,
) -> Run:
    """Steps 1 and 2: choose samples and record the attention to their vision tokens. Continues an interrupted run.

    Args:
        backbone: ``demo``, a checkpoint folder or a hub name.
        dataset: as ``--dataset`` of the command line; several are mixed. None: a demo backbone's own.
        out: folder of the run.
        samples: to profile.
        eval_samples: to hold out for `Run.evaluate`.
        seed: of the choice of samples and of all resampling.
        batch_size: most samples in a forward pass.
        device: of the backbone.
        dtype: of the backbone; ``auto`` is float32 on a CPU.
        progress: called with the samples done and all samples.
        columns: how a table is read: `schedule_finder.samples.DataOptions`.

    Raises:
        InputError: something given cannot be used; nothing was written.
        StoreError: ``out`` holds a profile of another backbone or of other options.
        UnsupportedBackbone: no layer of the decoder has attention that can be recorded.
    """
    from schedule_finder import pipeline
    from schedule_finder.models.loading import load_backbone, set_threads
    from schedule_finder.profiling.engines.base import BatchLimits
    from schedule_finder.profiling.engines.local import LocalEngine
    from schedule_finder.samples import open_data

    sources = _sources(backbone, dataset)
    check_folder(folder := Path(out))
    check_not_among_data(folder, sources)
    reading: dict[str, Any] = dict.fromkeys(_ALWAYS_STORED) | columns
    options = {
        "backbone": backbone,
        "dataset": sources[0] if len(sources) == 1 else sources,
        "samples": samples,
        "eval_samples": eval_samples,
        "seed": seed,
        "columns": reading,
    }
    data = open_data(sources, seed=seed, **reading)
    set_threads(backbone)
    loaded = load_backbone(backbone, device=device, dtype=dtype)
    command = f"schedule_finder.profile({backbone!r}, {dataset!r}, out={os.fspath(out)!r})"
    files = RunFolder.begin(folder, command, options)
    with LocalEngine(loaded, data, BatchLimits(samples=batch_size)) as engine:
        pipeline.profile_step(files, engine, data, progress, report=log.warning)
    return Run(files, device, dtype, model=(loaded, data))


def find_schedule(
    backbone: str,
    dataset: str | Sequence[str] | None = None,
    *,
    out: str | os.PathLike[str],
    budget: float = 0.35,
    kind: BudgetKind = "processed",
    solver: str = "sensitivity",
    scorer: str = "auto",
    dropped_tokens: str = "auto",
    **options: Any,
) -> Schedule:
    """Steps 1 to 4: profile, detect change points, search.

    The run is in ``out``; `load_run` opens it, for example for the evaluation. A second call with the same options
    continues there and repeats no finished work.

    Args:
        backbone: ``demo``, a checkpoint folder or a hub name.
        dataset: as for `profile`.
        out: folder of the run.
        budget: fraction of the unpruned cost, above 0 and at most 1.
        kind: unit of the budget: processed, published, flops, kv or latency.
        solver: how the stages are chosen, as ``--solver`` of ``adaptinfer-profile schedule``.
        scorer: how tokens are ranked, as ``--scorer``; ``auto`` compares all scorers.
        dropped_tokens: ``discard``, ``merge``, or ``auto``, which compares both.
        options: further arguments of `profile`: ``samples``, ``eval_samples``, ``seed``, ``device`` and others.

    Returns:
        The schedule, which is also selected in the run (``4_schedule.json``).

    Raises:
        InputError: something given cannot be used, or the budget cannot be met.
        UnsupportedBackbone: the backbone cannot be profiled or pruned; the message says why.
    """
    run = profile(backbone, dataset, out=out, **options)
    run.detect()
    return run.search(budget, kind=kind, solver=solver, scorer=scorer, dropped_tokens=dropped_tokens)


def _sources(backbone: str, dataset: str | Sequence[str] | None) -> list[str]:
    """The data sets as a list. Raises `InputError` where there is none for this backbone."""
    if dataset:
        return [dataset] if isinstance(dataset, str) else list(dataset)
    from schedule_finder.demo import BACKBONE_FOLDERS

    if backbone not in BACKBONE_FOLDERS:
        raise InputError(
            f"backbone {backbone!r} needs a dataset (a .jsonl, .parquet or .csv file, a folder, a hub name, a preset)"
        )
    return [backbone]
