"""What several commands share: opening runs, loading backbones and data sets, making an engine."""

from __future__ import annotations

import functools
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from schedule_finder.cli.names import AUTO, ENGINE_NAMES
from schedule_finder.cli.parsing import choice, number_of_samples
from schedule_finder.cli.progress import note, progress_bar, status
from schedule_finder.cli.runner import command_line
from schedule_finder.cli.terminal import screen
from schedule_finder.errors import InputError
from schedule_finder.measuring.token_policy import ANSWER_TOKENS
from schedule_finder.models.load_options import LoadOptions
from schedule_finder.run.folder import Run
from schedule_finder.run.output_folder import check_folder, check_not_among_data
from schedule_finder.run.schema import RUN_OPTIONS, missing_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from schedule_finder.models.loading import LoadedBackbone
    from schedule_finder.profiling.engines.base import BatchLimits, Engine
    from schedule_finder.samples import DataSet
    from schedule_finder.search import Search

_ALWAYS_STORED = ("split", "image_column", "question_column", "answer_column")


def open_run(folder: Path) -> Run:
    """The run in ``folder``. Raises `InputError` if there is none."""
    run = Run(folder)
    if (problem := missing_fields(run.options, RUN_OPTIONS)) is not None:
        raise InputError(f"{run.path}: options: {problem}; restore it or begin a new run")
    return run


@dataclass(frozen=True)
class BackboneOptions:
    """How a backbone is loaded."""

    name: str
    device: str
    dtype: str
    threads: int | None
    options: LoadOptions = field(default_factory=LoadOptions)

    def load(self) -> LoadedBackbone:
        """Load the backbone and set the number of threads. Raises `InputError`."""
        with status("loading the backbone"):
            from schedule_finder.models.loading import load_backbone, set_threads

            set_threads(self.name, self.threads)
            return load_backbone(self.name, device=self.device, dtype=self.dtype, options=self.options)


def load_again(
    run: Run, device: str, dtype: str, threads: int | None, trust_remote_code: bool = False
) -> tuple[LoadedBackbone, DataSet]:
    """The backbone and the data set of a run that exists, loaded as the run was begun.

    Raises:
        InputError: one of them does not load, or the checkpoint is not the one that was profiled.
    """
    options = run.options
    how = LoadOptions.of_run(options.get("loading", {}), trust_remote_code=trust_remote_code)
    with run.opening():
        data = open_data_of(options)
        loaded = BackboneOptions(options["backbone"], device, dtype, threads, how).load()
    run.profile.check_backbone(loaded.identity.model_dump(), note)
    return loaded, data


def open_data_of(options: dict[str, Any]) -> DataSet:
    """The data set that a run's options name."""
    from schedule_finder.samples import open_data

    return open_data(options["dataset"], seed=options["seed"], **options["columns"])


@dataclass(frozen=True)
class EngineOptions:
    """What runs the samples, and in which batches."""

    name: str
    workers: int | None
    batch_size: int
    batch_tokens: int | None
    text_queries: int | None

    @property
    def limits(self) -> BatchLimits:
        """Of the batches."""
        from schedule_finder.profiling.engines.base import BatchLimits

        return BatchLimits(self.batch_size, self.batch_tokens, self.text_queries)

    def make(self, backbone: BackboneOptions, data: DataSet, options: dict[str, Any]) -> Engine:
        """The engine, with its backbone loaded. Raises `InputError`."""
        from schedule_finder.profiling.engines.local import LocalEngine
        from schedule_finder.profiling.engines.ray_engine import RayEngine, WorkerSettings

        if choice("--engine", self.name, ENGINE_NAMES) == "ray":
            settings = WorkerSettings(
                backbone.load,
                functools.partial(open_data_of, options),
                self.limits,
                threads=backbone.threads or 1,
                gpus={"auto-map": None, "cpu": 0}.get(backbone.device, 1),
            )
            with status("starting Ray workers"):
                return RayEngine(settings, self.workers)
        if self.workers is not None:
            raise InputError(f"--workers {self.workers}: needs --engine ray; the local engine is one process")
        return LocalEngine(backbone.load(), data, self.limits)


def begin_run(
    backbone: BackboneOptions,
    engine: EngineOptions,
    *,
    dataset: list[str] | None,
    samples: str,
    eval_samples: int,
    seed: int,
    columns: dict[str, Any],
    out: Path | None,
    metric: str | None = None,
    check: Callable[[Run, Engine, DataSet], None] = lambda _run, _engine, _data: None,
    write: bool = True,
) -> tuple[Run, Engine, DataSet]:
    """Load everything that can fail, and only then write the run's folder, unless ``write`` is False.

    ``check`` raises `InputError` where the run cannot work; it is called before anything is written.
    """
    folder = out or Path("outputs") / Path(backbone.name).name
    check_folder(folder)
    from schedule_finder.pipeline import MOST_SAMPLES

    if not dataset:
        from schedule_finder.demo import BACKBONE_FOLDERS

        if backbone.name not in BACKBONE_FOLDERS:
            raise InputError(
                f"backbone {backbone.name!r} needs --dataset (a .jsonl, .parquet or .csv file, a folder, a hub name, "
                "a preset)"
            )
        dataset = [backbone.name]
    number = number_of_samples(samples)
    rows = (MOST_SAMPLES if number == AUTO else int(number)) + eval_samples
    options = {
        "backbone": backbone.name,
        "dataset": dataset[0] if len(dataset) == 1 else dataset,
        "samples": number,
        "eval_samples": eval_samples,
        "seed": seed,
        "columns": _stored_columns(columns, rows),
    }
    if metric is not None:
        options["metric"] = metric
    if loading := backbone.options.stored():
        options["loading"] = loading
    check_not_among_data(folder, dataset)
    data = open_data_of(options)
    running = engine.make(backbone, data, options)
    check(Run(folder), running, data)
    run = Run.begin(folder, command_line(), options) if write else Run(folder)
    identity = running.meta["backbone"]
    screen.print(
        f"[bold]{escape(backbone.name)}[/bold] ({identity['model_type']}, {identity['num_layers']} layers, "
        f"{running.meta['dtype']} on {running.place}) with data set [bold]{escape(' + '.join(dataset))}[/bold] "
        f"-> {folder}",
        soft_wrap=True,
    )
    return run, running, data


def _stored_columns(columns: dict[str, Any], rows: int) -> dict[str, Any]:
    """The data options as ``run.json`` keeps them.

    Options that later releases added are stored only if they were given, so that a run of an earlier release can be
    continued.
    """
    stored = {name: value for name, value in columns.items() if name in _ALWAYS_STORED or value is not None}
    return stored | ({"rows": rows} if columns["streaming"] else {})


@contextmanager
def open_search(
    run: Run,
    model: tuple[LoadedBackbone, DataSet] | None,
    batch_size: int,
    answer_tokens: int | None,
    *,
    served: bool = False,
) -> Iterator[Search]:
    """The search over a run, with a progress bar for what it measures on ``model``.

    ``answer_tokens``: longest answer that is measured; None: the default, or without a model what was measured.
    ``served``: search what a serving engine can run.
    """
    from schedule_finder.search import Search
    from schedule_finder.served_search import ServedSearch

    with progress_bar("measure") if model else nullcontext(lambda _done, _total: None) as progress:
        tokens = answer_tokens or (ANSWER_TOKENS if model else None)
        kind = ServedSearch if served else Search
        yield kind(run, model, batch_size=batch_size, answer_tokens=tokens, progress=progress)
