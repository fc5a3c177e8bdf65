"""``adaptinfer-profile``: thin commands over the steps; heavy imports happen inside them."""

from __future__ import annotations

import functools
import inspect as python_inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from schedule_finder.cli import terminal as tables
from schedule_finder.cli.terminal import screen

if TYPE_CHECKING:
    from pruning_runtime.schedule import BudgetKind as Kind
    from schedule_finder.models.loading import LoadedBackbone
    from schedule_finder.profiling.engines.base import BatchLimits, Engine
    from schedule_finder.run.folder import Run
    from schedule_finder.samples import DataSet
    from schedule_finder.search import Search

app = typer.Typer(
    help="Discover where a vision-language backbone stops needing its vision tokens, and prune them there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
notes = Console(stderr=True)

DEFAULT_BUDGET = "35%"

Backbone = Annotated[str, typer.Argument(help="`demo`, a checkpoint folder, or a hub name.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run; default outputs/BACKBONE.")]
Dataset = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        help="`demo`, a .jsonl/.parquet/.arrow/.csv/.tsv file, a folder, a hub name, a preset (pope, mmmu, ...) or "
        "PRESET=FILE. Again for a mixture in equal shares.",
    ),
]
Samples = Annotated[
    str, typer.Option("--samples", help="Samples to profile; auto: until more would change nothing.")
]
EvalSamples = Annotated[int, typer.Option("--eval-samples", min=0, help="Held-out samples to evaluate on.")]
Budget = Annotated[
    str, typer.Option("--budget", help="Fraction of the unpruned cost: 0.15 or 15%; latency also 12ms.")
]
BudgetKind = Annotated[str, typer.Option("--budget-kind", help="processed, published, flops, kv or latency.")]
Solver = Annotated[
    str,
    typer.Option(
        "--solver", help="How stages are chosen: sensitivity, retained, paper, pyramid, fitprune or grid."
    ),
]
Scorer = Annotated[
    str,
    typer.Option("--scorer", help="auto (the solver compares), text_guided, uniform_text or last_token."),
]
DroppedTokens = Annotated[
    str, typer.Option("--dropped-tokens", help="What dropped tokens leave behind: auto, none or merged.")
]
Model = Annotated[
    bool, typer.Option("--model/--no-model", help="Measure on the backbone, or use only what is stored.")
]
Pareto = Annotated[
    bool, typer.Option("--pareto", help="Solve for a range of budgets instead: a table and a figure.")
]
Detector = Annotated[str | None, typer.Option("--detector", help="distribution_shift or token_curve.")]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="auto, cpu, cuda, cuda:1, ..., or auto-map: over all GPUs and host memory."
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Most samples in a batch.")]
BatchTokens = Annotated[
    int,
    typer.Option(
        "--batch-tokens",
        min=1,
        help="Most tokens in a batch, vision, text and padding; halved when memory runs out.",
    ),
]
MaxSkipped = Annotated[
    str, typer.Option("--max-skipped", help="Share of unusable samples that stops the run: 0.05 or 5%.")
]
EngineName = Annotated[
    str, typer.Option("--engine", help="local, or ray: one worker per GPU of a Ray cluster.")
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Ray workers; default one per GPU, or one without GPUs."),
]
Seed = Annotated[int, typer.Option("--seed")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads; default 1 for the demo, else torch's own."),
]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
DATA_OPTIONS: dict[str, Any] = {
    "split": Annotated[
        str | None, typer.Option("--split", help="Split of a hub data set or folder; default the first of test, "
        "validation, val, dev, train that is there.")
    ],
    "config": Annotated[
        str | None, typer.Option("--dataset-config", help="Config of a hub data set or folder.")
    ],
    "streaming": Annotated[
        bool | None,
        typer.Option("--streaming", help="Read the first rows only, 4 for each sample asked for, and draw from them."),
    ],
    "image_column": Annotated[
        str | None,
        typer.Option("--image-column", help="Column with images or paths; several: a,b; or images/{id}.jpg."),
    ],
    "video_column": Annotated[
        str | None,
        typer.Option("--video-column", help="Column with video files or lists of frames; or videos/{id}.mp4."),
    ],
    "question_column": Annotated[str | None, typer.Option("--question-column", help="Column with questions.")],
    "question_template": Annotated[
        str | None,
        typer.Option("--question-template", help="Question over the row's columns: '{question} Options: {options}'; "
        "{options:letters} spells a list as lines A. B. C."),
    ],
    "answer_column": Annotated[
        str | None, typer.Option("--answer-column", help="Column with answers, or lists of them.")
    ],
    "frames": Annotated[
        int | None, typer.Option("--frames", min=1, help="Frames of each video, evenly spread; default 8.")
    ],
}  # fmt: skip
"""How a data set is read: options by their names in `DataOptions`, which has the defaults."""
Baselines = Annotated[
    str | None,
    typer.Option(
        "--baselines", help="all, none, or names with commas between; default random, strided and last_token."
    ),
]
Sweep = Annotated[bool, typer.Option("--sweep/--no-sweep", help="Also evaluate schedules for other budgets.")]
Json = Annotated[bool, typer.Option("--json", help="Last line of stdout: one JSON document.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _command(function: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Register a command: errors become one line, and what it returns the JSON document.

    Exit code 2 for bad input, 1 for a failure. A function with a parameter ``columns`` gets all `DATA_OPTIONS`.
    """
    own = python_inspect.signature(function, eval_str=True).parameters
    common = {name: (kind, False) for name, kind in (("json_output", Json), ("debug", Debug))}
    reads_data = "columns" in own

    @functools.wraps(function)
    def guarded(*args: Any, json_output: bool, debug: bool, **kwargs: Any) -> None:
        if reads_data:
            kwargs["columns"] = {name: kwargs.pop(name) for name in DATA_OPTIONS}
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            if debug:
                raise
            from pruning_runtime import PruningError, ScheduleError, UnsupportedBackbone
            from schedule_finder.errors import InputError
            from schedule_finder.profiling.capture import ProfileError
            from schedule_finder.profiling.store import StoreError

            bad_input = (
                InputError,
                ScheduleError,
                UnsupportedBackbone,
                PruningError,
                ProfileError,
                StoreError,
            )
            if isinstance(error, bad_input):
                notes.print(f"[red]error:[/red] {escape(_one_line(error))}", soft_wrap=True)
                raise SystemExit(2) from None
            notes.print(
                f"[red]failed:[/red] {type(error).__name__}: {escape(_one_line(error))} (--debug shows where)",
                soft_wrap=True,
            )
            raise SystemExit(1) from None
        if json_output:
            sys.stdout.write(json.dumps(result) + "\n")

    data_options = {name: (kind, None) for name, kind in DATA_OPTIONS.items()} if reads_data else {}
    parameters = [parameter for name, parameter in own.items() if name != "columns"] + [
        python_inspect.Parameter(
            name, python_inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
        )
        for name, (kind, default) in (data_options | common).items()
    ]
    guarded.__signature__ = python_inspect.Signature(parameters)  # type: ignore[attr-defined]
    guarded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command()(guarded)
    return guarded


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@_command
def run(
    backbone: Backbone = "demo",
    dataset: Dataset = None,
    samples: Samples = "1000",
    eval_samples: EvalSamples = 450,
    budget: Budget = DEFAULT_BUDGET,
    budget_kind: BudgetKind = "processed",
    solver: Solver = "sensitivity",
    scorer: Scorer = "auto",
    dropped_tokens: DroppedTokens = "auto",
    detector: Detector = None,
    out: Out = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 32,
    batch_tokens: BatchTokens = 16384,
    max_skipped: MaxSkipped = "5%",
    engine: EngineName = "local",
    workers: Workers = None,
    seed: Seed = 0,
    threads: Threads = None,
    max_new_tokens: Tokens = 16,
    baselines: Baselines = None,
    sweep: Sweep = False,
    *,
    columns: dict[str, Any],
) -> dict[str, Any]:
    """The main job: profile, detect, schedule, evaluate, plot.

    adaptinfer-profile run demo

    adaptinfer-profile run ./my-llava --dataset data.jsonl --samples 64 --out outputs/mine

    adaptinfer-profile run ./my-llava --dataset pope --dataset textvqa --budget 25%
    """
    from schedule_finder import pipeline

    kind = _kind(budget_kind)
    _check_budget(budget, kind)
    most = _fraction("--max-skipped", max_skipped)
    current, running, data = _begin(
        backbone, dataset, samples, eval_samples, out, device, dtype, seed, threads, columns,
        engine=engine, workers=workers, batch_size=batch_size, batch_tokens=batch_tokens,
    )  # fmt: skip
    with running:
        _profile(current, running, data, most)
    tables.show_detections(pipeline.detect_step(current, detector))
    # Workers on a cluster keep their backbones to themselves.
    loaded = running.loaded or _load(backbone, device, dtype, threads)
    with _search(current, (loaded, data), batch_size) as search:
        fraction = _share(budget, search)
        schedule = pipeline.schedule_step(
            current,
            search,
            budget=fraction,
            kind=kind,
            solver=solver,
            scorer=scorer,
            dropped_tokens=dropped_tokens,
        )
    tables.show_schedule(schedule)
    table = None
    if eval_samples:
        table = _evaluate(current, loaded, data, batch_size, max_new_tokens, baselines, sweep)
    figures = _plot(current)
    return _finish(current, table, figures)


@_command
def profile(
    backbone: Backbone = "demo",
    dataset: Dataset = None,
    samples: Samples = "1000",
    eval_samples: EvalSamples = 450,
    out: Out = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 32,
    batch_tokens: BatchTokens = 16384,
    max_skipped: MaxSkipped = "5%",
    engine: EngineName = "local",
    workers: Workers = None,
    seed: Seed = 0,
    threads: Threads = None,
    *,
    columns: dict[str, Any],
) -> dict[str, Any]:
    """Steps 1 and 2: choose samples and record what text looks at, layer by layer. Resumes."""
    most = _fraction("--max-skipped", max_skipped)
    current, running, data = _begin(
        backbone, dataset, samples, eval_samples, out, device, dtype, seed, threads, columns,
        engine=engine, workers=workers, batch_size=batch_size, batch_tokens=batch_tokens,
    )  # fmt: skip
    with running:
        counts = _profile(current, running, data, most)
    screen.print(f"profile: {current.profile.folder}")
    return {"run": str(current.folder), **counts}


@_command
def detect(folder: RunArgument, detector: Detector = None) -> dict[str, Any]:
    """Step 3: change points of a run's profile, by every detector."""
    from schedule_finder import pipeline

    current = _open(folder)
    document = pipeline.detect_step(current, detector)
    tables.show_detections(document)
    found = {name: entry["change_points"] for name, entry in document["detectors"].items()}
    return {"run": str(folder), "default": document["default"], "change_points": found}


@_command
def schedule(
    folder: RunArgument,
    budget: Budget = DEFAULT_BUDGET,
    budget_kind: BudgetKind = "processed",
    solver: Solver = "sensitivity",
    scorer: Scorer = "auto",
    dropped_tokens: DroppedTokens = "auto",
    pareto: Pareto = False,
    model: Model = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 32,
    threads: Threads = None,
) -> dict[str, Any]:
    """Step 4: a schedule for any budget, from the profile and from what the solver measures on the backbone.

    adaptinfer-profile schedule outputs/demo --budget 25%

    adaptinfer-profile schedule outputs/demo --budget 15% --solver retained

    adaptinfer-profile schedule outputs/demo --pareto --no-model
    """
    from schedule_finder import figures, pipeline
    from schedule_finder.solvers import SOLVERS

    current = _open(folder)
    kind = _kind(budget_kind)
    _check_budget(budget, kind)
    measures = model and (solver not in SOLVERS or SOLVERS[solver].measures or kind == "latency")
    backbone = _load_again(current, device, dtype, threads) if measures else None
    with _search(current, backbone, batch_size) as search:
        if pareto:
            table = pipeline.pareto_step(
                current, search, kind=kind, solver=solver, scorer=scorer, dropped_tokens=dropped_tokens
            )
            tables.show_pareto(table, current)
            drawn = figures.make_figures(current, ["4_pareto"])
            for path in drawn:
                screen.print(f"figure: {path}", soft_wrap=True)
            return {
                "run": str(folder),
                "pareto": table.to_dict(orient="records"),
                "figures": [str(path) for path in drawn],
            }
        found = pipeline.schedule_step(
            current,
            search,
            budget=_share(budget, search),
            kind=kind,
            solver=solver,
            scorer=scorer,
            dropped_tokens=dropped_tokens,
        )
    tables.show_schedule(found)
    screen.print(f"schedule: {current.schedule}")
    return {"run": str(folder), "schedule": str(current.schedule), "budget": found.model_dump()["budget"]}


@_command
def evaluate(
    folder: RunArgument,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = 32,
    threads: Threads = None,
    max_new_tokens: Tokens = 16,
    baselines: Baselines = None,
    sweep: Sweep = False,
) -> dict[str, Any]:
    """Step 5: the schedule and its baselines against the full model, on held-out samples."""
    current = _open(folder)
    loaded, data = _load_again(current, device, dtype, threads)
    table = _evaluate(current, loaded, data, batch_size, max_new_tokens, baselines, sweep)
    tables.show_evaluation(table, current)
    return {"run": str(folder), "evaluation": str(current.evaluation)}


@_command
def plot(folder: RunArgument) -> dict[str, Any]:
    """Step 6: figures (PDF and PNG) of what a run holds, with the tables they were drawn from."""
    current = _open(folder)
    figures = _plot(current)
    for path in figures:
        screen.print(str(path), soft_wrap=True)
    return {"run": str(folder), "figures": [str(path) for path in figures]}


@_command
def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the joined run.")],
) -> dict[str, Any]:
    """Join the profiles of separate jobs on one data set into a run for detect, schedule and evaluate.

    adaptinfer-profile merge outputs/job0 outputs/job1 --out outputs/both
    """
    from schedule_finder.run.folder import Run
    from schedule_finder.run.merging import merge_runs

    joined = Run(out)
    counts = merge_runs([_open(folder) for folder in folders], joined, _command_line())
    screen.print(f"profile: {joined.profile.folder}, {counts['done']} samples", soft_wrap=True)
    return {"run": str(out), **counts}


@_command
def bench(
    backbone: Annotated[
        str,
        typer.Argument(help="`shape:llava-1.5-7b` and the like, `demo`, a checkpoint folder, or a hub name."),
    ],
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help="Schedule file or preset; default the published preset that fits."),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option("--batch", help="Batch sizes: 1,8,32. Default that on a GPU, 1 on the CPU."),
    ] = None,
    lengths: Annotated[str, typer.Option("--lengths", help="Numbers of new tokens: 1,16,128.")] = "1,16,128",
    vision_tokens: Annotated[
        int | None,
        typer.Option("--vision-tokens", help="Of each prompt; default what one typical image makes."),
    ] = None,
    text_tokens: Annotated[int, typer.Option("--text-tokens", help="Of each prompt.")] = 88,
    rounds: Annotated[int, typer.Option("--rounds", min=3, help="Most rounds for each batch size.")] = 15,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds", help="No new round after so long, all batch sizes together; three are run anyway."
        ),
    ] = 60.0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder; default outputs/bench/BACKBONE.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads; default 1 on the CPU.")
    ] = None,
) -> dict[str, Any]:
    """Latency and memory by part: the schedule and its baselines on random prompts, in the same run.

    adaptinfer-profile bench shape:llava-1.5-7b

    adaptinfer-profile bench shape:llava-tiny --device cpu --batch 1,8

    adaptinfer-profile bench ./my-llava --schedule outputs/mine/4_schedule.json
    """
    import torch

    from schedule_finder import benchmark
    from schedule_finder.figures.benchmark import draw_benchmark
    from schedule_finder.models.loading import load_to_measure

    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    sizes = _whole_numbers("--batch", batch or ("1" if on_cpu else "1,8,32"))
    new_tokens = _whole_numbers("--lengths", lengths)
    if threads or on_cpu:
        torch.set_num_threads(threads or 1)
    with _status("loading the backbone"):
        loaded = load_to_measure(backbone, device=device, dtype=dtype)
    chosen, source = benchmark.choose_schedule(schedule, loaded)
    with _progress("rounds") as progress:
        document = benchmark.run_benchmark(
            loaded, chosen, schedule_source=source, batches=sizes, lengths=new_tokens, num_vision=vision_tokens,
            num_text=text_tokens, rounds=rounds, seconds=seconds, progress=progress,
        )  # fmt: skip
    folder = out or Path("outputs/bench") / Path(backbone.removeprefix("shape:")).name
    paths = benchmark.write_benchmark(document, folder) + draw_benchmark(document, folder)
    tables.show_benchmark(document)
    screen.print(f"written: {folder} ({len(paths)} files)", soft_wrap=True)
    return document


@_command
def inspect(
    what: Annotated[
        str, typer.Argument(metavar="RUN|SCHEDULE|BACKBONE", help="Folder, schedule file or backbone.")
    ],
) -> dict[str, Any]:
    """What is in a run, a schedule file, a published preset or a backbone, as tables."""
    from pruning_runtime import Schedule
    from schedule_finder.evidence import HeldOutSummary
    from schedule_finder.run.folder import Run

    path = Path(what)
    if (path / "run.json").exists():
        current = _open(path)
        tables.show_run(current)
        return current.document()
    held_out = None
    if path.is_file():
        found = Schedule.load(path)
        held_out = HeldOutSummary.load(Run(path.parent).evaluation_summary)
    elif what in Schedule.presets():
        found = Schedule.preset(what)
    else:
        facts = _backbone_facts(_load(what, "cpu", "auto", None))
        tables.show_backbone(what, facts)
        return facts
    tables.show_schedule(found, held_out)
    return found.model_dump(mode="json")


@_command
def backbones() -> dict[str, Any]:
    """Families on which pruning was shown to be exact, and how. Others are tried, or refused by name."""
    from dataclasses import asdict

    from schedule_finder.models.verified_families import VERIFIED

    tables.show_families(list(VERIFIED.values()))
    return {key: asdict(family) | {"reference": family.reference} for key, family in VERIFIED.items()}


# ---- pieces of commands


def _fraction(option: str, text: str) -> float:
    from schedule_finder.errors import InputError

    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise InputError(f"{option} {text!r} is no number; write 0.15 or 15%") from None
    if not 0 < value <= 1:
        raise InputError(f"{option} {text}: above 0 and at most 1 (or 100%)")
    return value


def _check_budget(text: str, kind: Kind) -> None:
    """Refuse what no backbone can make sense of, before one is loaded. Raises `InputError`."""
    from schedule_finder.errors import InputError

    if not text.endswith("ms"):
        _fraction("--budget", text)
    elif kind != "latency":
        raise InputError(f"--budget {text}: milliseconds need --budget-kind latency, not {kind}")
    else:
        _milliseconds(text)


def _milliseconds(text: str) -> float:
    from schedule_finder.errors import InputError

    try:
        return float(text.removesuffix("ms"))
    except ValueError:
        raise InputError(f"--budget {text!r} is no number; write 12.5ms") from None


def _share(text: str, search: Search) -> float:
    """A checked budget as a fraction of the unpruned cost."""
    if text.endswith("ms"):
        return search.share_of_prefill(_milliseconds(text))
    return _fraction("--budget", text)


def _samples(text: str) -> int | str:
    """A number of samples, or `auto`."""
    from schedule_finder.errors import InputError
    from schedule_finder.search import AUTO

    if text == AUTO:
        return text
    if not text.isdecimal() or int(text) < 2:
        raise InputError(f"--samples {text!r}: a number from 2 on, or {AUTO}")
    return int(text)


def _whole_numbers(option: str, text: str) -> list[int]:
    from schedule_finder.errors import InputError

    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"{option} {text!r}: whole numbers from 1 on with commas between, as in 1,8,32")
    return sorted({int(part) for part in parts})


def _kind(text: str) -> Kind:
    from typing import get_args

    from pruning_runtime.schedule import BudgetKind as Kinds
    from schedule_finder.errors import InputError

    for kind in get_args(Kinds):
        if text == kind:
            return kind
    raise InputError(f"--budget-kind {text!r}: choose {', '.join(get_args(Kinds))}")


def _open(folder: Path) -> Run:
    from schedule_finder.run.folder import Run

    current = Run(folder)
    current.document()
    return current


def _begin(
    backbone: str,
    dataset: list[str] | None,
    samples: str,
    eval_samples: int,
    out: Path | None,
    device: str,
    dtype: str,
    seed: int,
    threads: int | None,
    columns: dict[str, Any],
    *,
    engine: str,
    workers: int | None,
    batch_size: int,
    batch_tokens: int,
) -> tuple[Run, Engine, DataSet]:
    """Load everything that can be wrong before anything is written."""
    from schedule_finder.errors import InputError
    from schedule_finder.pipeline import MOST_SAMPLES
    from schedule_finder.profiling.engines.base import BatchLimits
    from schedule_finder.run.folder import Run
    from schedule_finder.search import AUTO

    if not dataset:
        if backbone != "demo":
            raise InputError(
                f"backbone {backbone!r} needs --dataset (a .jsonl, .parquet or .csv file, a folder, a hub name, a preset)"
            )
        dataset = ["demo"]
    options = {
        "backbone": backbone,
        "dataset": dataset[0] if len(dataset) == 1 else dataset,
        "samples": (number := _samples(samples)),
        "eval_samples": eval_samples,
        "seed": seed,
        "columns": _said(columns, (MOST_SAMPLES if number == AUTO else int(number)) + eval_samples),
    }
    data = _open_data(options)
    load = functools.partial(_load, backbone, device, dtype, threads)
    limits = BatchLimits(samples=batch_size, tokens=batch_tokens)
    running = _make_engine(
        engine, workers, load, data, functools.partial(_open_data, options), limits, device, threads
    )
    folder = out or Path("outputs") / Path(backbone).name
    current = Run.begin(folder, _command_line(), options)
    identity = running.meta["backbone"]
    screen.print(
        f"[bold]{escape(backbone)}[/bold] ({identity['model_type']}, {identity['num_layers']} layers, "
        f"{running.meta['dtype']} on {running.place}) with data set [bold]{escape(' + '.join(dataset))}[/bold] "
        f"-> {folder}",
        soft_wrap=True,
    )
    return current, running, data


def _command_line() -> str:
    return f"adaptinfer-profile {' '.join(sys.argv[1:])}"


def _make_engine(
    name: str,
    workers: int | None,
    load: Callable[[], LoadedBackbone],
    data: DataSet,
    open_data: Callable[[], DataSet],
    limits: BatchLimits,
    device: str,
    threads: int | None,
) -> Engine:
    from schedule_finder.errors import InputError
    from schedule_finder.profiling.engines.local import LocalEngine
    from schedule_finder.profiling.engines.ray_engine import RayEngine, WorkerSettings

    if name == "ray":
        gpus = {"auto-map": None, "cpu": 0}.get(device, 1)
        settings = WorkerSettings(load, open_data, limits, threads=threads or 1, gpus=gpus)
        with _status("starting Ray workers"):
            return RayEngine(settings, workers)
    if name != "local":
        raise InputError(f"--engine {name!r}: choose local or ray")
    if workers is not None:
        raise InputError(f"--workers {workers}: goes with --engine ray; the local engine is one process")
    return LocalEngine(load(), data, limits)


def _load(backbone: str, device: str, dtype: str, threads: int | None) -> LoadedBackbone:
    from schedule_finder.models.loading import load_backbone

    with _status("loading the backbone"):
        _set_threads(backbone, threads)
        return load_backbone(backbone, device=device, dtype=dtype)


def _said(columns: dict[str, Any], rows: int) -> dict[str, Any]:
    """The data options as ``run.json`` keeps them.

    The four that runs have always had, and others only where they were given: so a run that was begun before
    there were others goes on.
    """
    always = ("split", "image_column", "question_column", "answer_column")
    said = {name: value for name, value in columns.items() if name in always or value is not None}
    return said | ({"rows": rows} if columns["streaming"] else {})


def _set_threads(backbone: str, threads: int | None) -> None:
    import torch

    # The demo's matrices are too small to share: a second thread gains little on an idle machine, and on a
    # busy one the threads wait for each other (measured in LOG.md: ten times slower).
    if threads is None and backbone == "demo":
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)


def _open_data(options: dict[str, Any]) -> DataSet:
    from schedule_finder.samples import open_data

    return open_data(options["dataset"], seed=options["seed"], **options["columns"])


@contextmanager
def _status(what: str) -> Iterator[None]:
    with notes.status(what):
        yield


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=notes,
    )
    tasks: list[TaskID] = []

    def show(done: int, total: int) -> None:
        # No bar before there is something to show: not every solver measures a table.
        if not tasks:
            tasks.append(bar.add_task(what, total=total))
        bar.update(tasks[0], completed=done, total=total)

    with bar:
        yield show


def _profile(current: Run, running: Engine, data: DataSet, max_skipped: float) -> dict[str, Any]:
    from schedule_finder import pipeline
    from schedule_finder.profiling.convergence import Convergence
    from schedule_finder.search import AUTO

    seen_enough = current.options["samples"] == AUTO
    convergence = Convergence(current.convergence, seed=current.options["seed"]) if seen_enough else None
    with _progress("profile") as progress:
        counts = pipeline.profile_step(
            current,
            running,
            data,
            progress,
            report=_note,
            max_skipped=max_skipped,
            after_shard=convergence,
        )
    if convergence is not None:
        screen.print(f"stopped after {convergence}", soft_wrap=True)
    if counts["skipped"]:
        notes.print(
            f"{counts['skipped']} sample(s) skipped; the reasons are in {current.samples}", soft_wrap=True
        )
    return counts


def _evaluate(
    current: Run,
    loaded: LoadedBackbone,
    data: DataSet,
    batch_size: int,
    max_new_tokens: int,
    baselines: str | None,
    sweep: bool,
) -> Any:
    from schedule_finder import pipeline
    from schedule_finder.evaluation.methods import SWEEP

    with _progress("evaluate") as progress:
        return pipeline.evaluate_step(
            current,
            loaded,
            data,
            progress,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            baselines=baselines,
            sweep=SWEEP if sweep else (),
            report=_note,
        )


@contextmanager
def _search(current: Run, model: tuple[LoadedBackbone, DataSet] | None, batch_size: int) -> Iterator[Search]:
    """What solves for budgets, with a bar for what it measures."""
    from schedule_finder.search import Search

    with _progress("measure") if model else nullcontext(lambda _done, _total: None) as progress:
        yield Search(current, model, batch_size=batch_size, progress=progress)


def _load_again(current: Run, device: str, dtype: str, threads: int | None) -> tuple[LoadedBackbone, DataSet]:
    """The backbone and the data set of a run that was begun before."""
    from schedule_finder.models.loading import load_backbone

    options = current.options
    data = _open_data(options)
    with _status("loading the backbone"):
        _set_threads(options["backbone"], threads)
        loaded = load_backbone(options["backbone"], device=device, dtype=dtype)
    return loaded, data


def _note(line: str) -> None:
    notes.print(escape(line), soft_wrap=True)


def _plot(current: Run) -> list[Path]:
    from schedule_finder import figures

    with current.step("plot"), _status("drawing"):
        return figures.make_figures(current)


def _finish(current: Run, table: Any, figures: list[Path]) -> dict[str, Any]:
    if table is not None:
        tables.show_evaluation(table, current)
    screen.print(f"schedule: [bold]{current.schedule}[/bold]", soft_wrap=True)
    screen.print(f"figures:  [bold]{current.figures}[/bold] ({len(figures)} files)", soft_wrap=True)
    return {
        "run": str(current.folder),
        "schedule": str(current.schedule),
        "evaluation": str(current.evaluation) if table is not None else None,
        "figures": [str(path) for path in figures],
    }


def _backbone_facts(loaded: LoadedBackbone) -> dict[str, Any]:
    from dataclasses import asdict

    parts = loaded.backbone
    return {
        "class": type(parts.model).__name__,
        "model_type": parts.model_type,
        "decoder": type(parts.text_model).__name__,
        **asdict(parts.shape),
        "layer_kinds": sorted(set(parts.layer_kinds)),
        "vision_token_ids": list(parts.vision_token_ids),
        "attention": parts.text_model.config._attn_implementation,
        "config_digest": parts.config_digest,
    }
