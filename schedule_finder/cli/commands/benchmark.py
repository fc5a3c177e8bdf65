"""`benchmark`: tasks of lmms-eval with and without a schedule."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schedule_finder.cli.names import SCORER_NAMES, listed
from schedule_finder.cli.progress import note, progress_bar
from schedule_finder.cli.runner import command
from schedule_finder.cli.terminal import make_table, screen, show_table
from schedule_finder.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from schedule_finder.lmms_eval.runs import BenchmarkMethod

_Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub name.")]
_Tasks = Annotated[str, typer.Option("--tasks", help="Tasks of lmms-eval, with commas between.")]
_Schedules = Annotated[
    list[str], typer.Option("--schedule", help="Schedule file or preset; repeat it to compare several.")
]
_Base = Annotated[str, typer.Option("--base", help="Chat model of lmms-eval that runs MODEL.")]
_Baselines = Annotated[
    str,
    typer.Option(
        "--baselines",
        help="none, or names with commas between: smaller-images, or a scorer for the schedule's stages: "
        f"{listed(SCORER_NAMES)}.",
    ),
]
_Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="First items of each task only; default all.")
]
_Include = Annotated[Path | None, typer.Option("--include-path", help="Folder with tasks of your own.")]
_ModelArgs = Annotated[
    str, typer.Option("--model-args", help="Further arguments of the chat model: dtype=float16,...")
]
_Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...; default that of the chat model.")
]
_Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Prompts in a batch.")]
_Python = Annotated[
    str | None,
    typer.Option("--python", help="Python of an environment with lmms-eval; default the one that runs this."),
]
_Out = Annotated[Path | None, typer.Option("--out", help="Folder; default outputs/benchmark/MODEL.")]


FIGURE_SUFFIXES = (".pdf", ".png")


@command
def benchmark(
    model: _Model,
    tasks: _Tasks,
    schedule: _Schedules,
    base: _Base = "llava_hf",
    baselines: _Baselines = "random,strided,smaller-images",
    limit: _Limit = None,
    include_path: _Include = None,
    model_args: _ModelArgs = "",
    device: _Device = None,
    batch_size: _Batch = 1,
    python: _Python = None,
    out: _Out = None,
) -> dict[str, Any]:
    """Published benchmarks: the full model, schedules and baselines on the same items, by lmms-eval. Resumes.

    adaptinfer-profile benchmark llava-hf/llava-1.5-7b-hf --tasks pope,gqa --schedule adaptinfer/llava-1.5-7b-64
    """
    from schedule_finder.figures.task_retention import write_task_retention
    from schedule_finder.lmms_eval.runs import Benchmark
    from schedule_finder.lmms_eval.table import benchmark_table, write_table

    methods = _methods(schedule, baselines)
    options = ["--batch_size", str(batch_size)]
    for name, value in (("--limit", limit), ("--include_path", include_path), ("--device", device)):
        options += [] if value is None else [name, str(value)]
    folder = out or Path("outputs") / "benchmark" / Path(model).name
    with progress_bar("benchmark") as progress:
        run = Benchmark(
            folder,
            {"base": base, "pretrained": model} | _pairs(model_args),
            [task.strip() for task in tasks.split(",")],
            options,
            python or sys.executable,
            after_method=lambda done: progress(done, len(methods) + 1),
        )
        folders = run.run(methods)
    table = benchmark_table(folders)
    paths = write_table(table, folder)
    paths += [path for path in write_task_retention(table, folder / "retention") if path.suffix != ".csv"]
    _show(table)
    _show_hard_subset(table)
    for path in paths:
        screen.print(str(path), soft_wrap=True)
    if limit is not None:
        note(f"notice: the first {limit} items of each task only; these are not the benchmarks' scores")
    return {
        "tables": [str(path) for path in paths if path.suffix not in FIGURE_SUFFIXES],
        "figures": [str(path) for path in paths if path.suffix in FIGURE_SUFFIXES],
        "rows": table.astype(object).where(table.notna(), None).to_dict("records"),
    }


def _methods(schedules: list[str], baselines: str) -> list[BenchmarkMethod]:
    """Every schedule, each with its baselines; checked before anything runs. Raises `InputError`, `ScheduleError`."""
    from pruning_runtime.scorers import SCORERS
    from schedule_finder.lmms_eval.arguments import SMALLER_IMAGES, load_schedule
    from schedule_finder.lmms_eval.runs import BenchmarkMethod

    names = [] if baselines == "none" else [name.strip() for name in baselines.split(",")]
    for name in names:
        if name not in (known := (SMALLER_IMAGES, *SCORERS)):
            raise InputError(f"--baselines {name!r}: choose none, or some of {', '.join(known)}")
    found: dict[str, BenchmarkMethod] = {}
    for given in schedules:
        load_schedule(given)
        own = Path(given).stem if Path(given).exists() else given.replace("/", "-")
        where = str(Path(given).resolve()) if Path(given).exists() else given
        arguments = [(own, {"schedule": where})]
        arguments += [(f"{own}-{name}", {"schedule": where, "baseline": name}) for name in names]
        for name, each in arguments:
            if name in found or name == "full":
                raise InputError(f"--schedule {given}: a method {name!r} is there already; rename the file")
            found[name] = BenchmarkMethod(name, each)
    return list(found.values())


def _pairs(text: str) -> dict[str, str]:
    """``a=1,b=2`` as a dictionary. Raises `InputError`."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    for name, equals, _ in pairs:
        if not equals:
            raise InputError(f"--model-args: {name!r} has no value; write NAME=VALUE with commas between")
    return {name: value for name, _, value in pairs}


def _show(table: pd.DataFrame) -> None:
    """The main metric of each task: scores, retention and costs of every method."""
    from schedule_finder.lmms_eval.table import percent, score_text, with_interval

    main = table[table.main]
    for task in main.task.unique():
        own = main[main.task == task]
        shown = make_table(
            f"{task}: {own.metric.iloc[0]}; retention and costs in % of the full model",
            *("method", "score", "retention", "same", "proc.", "FLOPs", "KV", "time"),
        )
        for row in own.itertuples():
            kept = with_interval(row.retention, row.retention_low, row.retention_high)
            costs = (row.agreement, row.processed, row.flops, row.kv_bytes, row.prefill_ms)
            shown.add_row(row.method, score_text(row.score), kept, *map(percent, costs))
        show_table(shown)


def _show_hard_subset(table: pd.DataFrame) -> None:
    """Mean retention over the tasks, and scores on the hard items of all tasks, by method."""
    from schedule_finder.evaluation.hard_subset import describe_hard
    from schedule_finder.lmms_eval.table import averages, few, percent

    means = averages(table)
    shown = make_table(
        "all tasks: mean retention, and score on the hard subset",
        "method",
        "retention",
        "hard items",
        "score on them",
    )
    for row in means.itertuples():
        shown.add_row(row.method, percent(row.retention), few(row.hard_n), percent(row.hard_score))
    show_table(shown)
    known = means[means.hard_n.notna()]
    if known.empty:
        note("hard subset: skipped; it needs the baseline smaller-images, and a metric that scores items")
        return
    items = table[table.main & table.hard_n.notna()].groupby("method").n.sum().max()
    for count in dict.fromkeys(known.hard_n):
        screen.print(describe_hard(int(count), int(items)))
