"""`serve-check`: vLLM with and without a schedule on held-out samples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from schedule_finder.cli import options as opt
from schedule_finder.cli import parsing
from schedule_finder.cli.names import METRIC_NAMES
from schedule_finder.cli.progress import note, progress_bar, status
from schedule_finder.cli.runner import command
from schedule_finder.cli.session import open_data_of, open_run
from schedule_finder.cli.terminal import make_table, screen, show_table
from schedule_finder.errors import InputError
from schedule_finder.files import write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from schedule_finder.run.folder import Run
    from schedule_finder.run.schedules import NamedSchedule
    from schedule_finder.samples import Sample
    from schedule_finder.serving.check import Load
    from schedule_finder.serving.server import VllmInstallation

_Schedule = Annotated[
    str | None,
    typer.Option("--schedule", help="Name of a schedule of the run, or a file; default the selected one."),
]
_Served = Annotated[
    str | None,
    typer.Option("--model", help="Checkpoint folder or hub name to serve; default the run's backbone."),
]
_Concurrency = Annotated[
    str, typer.Option("--concurrency", help="Requests at a time, with commas between: each is measured.")
]
_Python = Annotated[
    str | None,
    typer.Option("--python", help="Python of an environment with vLLM; default the one that runs this."),
]
_VllmArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--vllm-arg", help="Further argument of both servers, as --vllm-arg=--dtype=float32; repeat it."
    ),
]


@command
def serve_check(
    folder: opt.RunArgument,
    schedule: _Schedule = None,
    model: _Served = None,
    concurrency: _Concurrency = "1,8,32",
    eval_samples: opt.FewerSamples = None,
    max_new_tokens: opt.MaxNewTokens = 16,
    metric: opt.Metric = None,
    python: _Python = None,
    vllm_arg: _VllmArgs = None,
) -> dict[str, Any]:
    """Before deployment: vLLM with and without a schedule on the run's held-out samples, side by side.

    adaptinfer-profile serve-check outputs/demo --schedule 25pct-processed-for-vllm

    adaptinfer-profile serve-check outputs/mine --concurrency 1,16 --vllm-arg=--max-model-len=4096
    """
    current = open_run(folder)
    levels = parsing.whole_numbers("--concurrency", concurrency)
    metric = metric and parsing.choice("--metric", metric, METRIC_NAMES)
    named = _servable(current, schedule)
    with status("asking vLLM for its version"):
        from schedule_finder.serving.server import VllmInstallation

        installation = VllmInstallation.of(python or sys.executable)
    samples = _samples(current, eval_samples)
    loads = _measured(
        current,
        installation,
        _model_path(current, model),
        named,
        samples,
        levels,
        vllm_arg or [],
        max_new_tokens,
        metric or current.options.get("metric"),
    )
    return _report(current, installation, named, loads)


def _servable(run: Run, given: str | None) -> NamedSchedule:
    """The schedule, if vLLM can run it. Raises `InputError`, `ScheduleError`."""
    from pruning_runtime.vllm.setting import Setting

    named = run.schedules.find(given) if given else run.schedules.selected()
    if named is None:
        raise InputError(
            f"{run.schedule}: there is no such file; write it with `adaptinfer-profile schedule {run.folder} --for vllm`"
        )
    Setting.of_schedule(named.schedule, named.name)
    if not named.schedule.stages:
        raise InputError(f"--schedule {named.name}: it has no stages, so there is nothing to compare")
    return named


def _samples(run: Run, most: int | None) -> list[Sample]:
    """The run's held-out samples."""
    from schedule_finder.evaluation.held_out import held_out_batches
    from schedule_finder.samples import read_entries

    entries = read_entries(run.samples)
    batches = held_out_batches(run, open_data_of(run.options), entries, 32, most)
    return [sample for batch in batches for sample in batch]


def _model_path(run: Run, given: str | None) -> str:
    """What vLLM loads."""
    from schedule_finder.demo import BACKBONE_FOLDERS

    name = given or run.options["backbone"]
    return str(BACKBONE_FOLDERS.get(name, name))


def _measured(
    run: Run,
    installation: VllmInstallation,
    model: str,
    named: NamedSchedule,
    samples: list[Sample],
    levels: list[int],
    arguments: list[str],
    max_new_tokens: int,
    metric: str | None,
) -> dict[str, list[Load]]:
    """Both servers, one after the other; what is measured is written after each level."""
    from schedule_finder.serving.check import FULL, check_that_it_pruned, measure_load
    from schedule_finder.serving.client import request_body
    from schedule_finder.serving.server import running_server

    out = _folder(run, named)
    named.schedule.save(out / "schedule.json")
    settings = {FULL: None, named.name: {"schedule": str((out / "schedule.json").resolve())}}
    loading = run.options.get("loading", {})
    given = {"--revision": loading.get("revision")} if model == run.options["backbone"] else {}
    arguments = [*(f"{name}={value}" for name, value in given.items() if value), *arguments]
    bodies = [request_body(sample, max_new_tokens, loading.get("system_prompt")) for sample in samples]
    found: dict[str, list[Load]] = {name: [] for name in settings}
    with progress_bar("serve") as progress:
        for name, setting in settings.items():
            with running_server(
                installation, model, out / f"{name}.log", setting=setting, arguments=arguments
            ) as url:
                measure_load(
                    url, name, samples, bodies, levels, metric, _recorder(found, name, out, progress, levels)
                )
            if setting is not None:
                check_that_it_pruned(found[FULL][0], found[name][0])
    return found


def _recorder(
    found: dict[str, list[Load]],
    name: str,
    out: Path,
    progress: Callable[[int, int], None],
    levels: list[int],
) -> Callable[[Load], None]:
    """Keeps and writes each level when it is measured."""

    def record(load: Load) -> None:
        found[name].append(load)
        rows = [one.row() for loads in found.values() for one in loads]
        write_json(out / "loads.json", rows)
        progress(len(rows), len(found) * len(levels))

    return record


def _folder(run: Run, named: NamedSchedule) -> Path:
    return run.folder / "serve_check" / named.name


def _report(
    run: Run, installation: VllmInstallation, named: NamedSchedule, loads: dict[str, list[Load]]
) -> dict[str, Any]:
    """Show and return both servers' numbers and the verdict."""
    from schedule_finder.serving.check import FULL, verdicts

    rows = [load.row() for one in loads.values() for load in one]
    table = make_table(
        f"vLLM {installation.version} on {installation.device}",
        *("server", "at a time", "score", "tokens", "answers/s", "TTFT ms", "95 %"),
    )
    for row in rows:
        score = "" if row["score"] is None else f"{100 * row['score']:.1f} %"
        times = (row["answers_per_second"], row["first_token_ms"], row["first_token_p95_ms"])
        table.add_row(
            str(row["method"]),
            str(row["concurrency"]),
            score,
            f"{row['prompt_tokens']:.0f}",
            *(f"{value:.1f}" for value in times),
        )
    show_table(table)
    screen.print(
        "at a time: requests; tokens: of a prompt; TTFT: time to the first token, median and 95th percentile"
    )
    lines = verdicts(loads[FULL], loads[named.name])
    for line in lines:
        screen.print(escape(line), soft_wrap=True)
    if installation.device == "cpu":
        note("notice: measured on a CPU; throughput and time to the first token say nothing about a GPU")
    out = _folder(run, named)
    document = {"vllm": installation.version, "device": installation.device, "rows": rows, "verdicts": lines}
    write_json(out / "serve_check.json", document)
    screen.print(str(out / "serve_check.json"), soft_wrap=True)
    return {"run": str(run.folder), "schedule": named.name, **document}
