"""`evaluate`, `plot` and `inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pruning_runtime.schedule import Schedule
from schedule_finder.cli import options as opt
from schedule_finder.cli import parsing
from schedule_finder.cli.names import METRIC_NAMES, RESERVED_NAMES, STYLE_NAMES, listed
from schedule_finder.cli.progress import progress_bar
from schedule_finder.cli.runner import command
from schedule_finder.cli.session import BackboneOptions, load_again, open_run
from schedule_finder.cli.steps import draw_figures, evaluate_schedule, note_stale
from schedule_finder.cli.terminal import screen
from schedule_finder.cli.terminal.evaluation import show_evaluation
from schedule_finder.cli.terminal.run import show_backbone, show_run
from schedule_finder.cli.terminal.schedule import show_schedule
from schedule_finder.cli.terminal.verification import show_verification
from schedule_finder.errors import InputError
from schedule_finder.models.load_options import LoadOptions
from schedule_finder.run.folder import Run
from schedule_finder.run.numbers import read_rows, run_numbers

if TYPE_CHECKING:
    from schedule_finder.models.loading import LoadedBackbone


@command
def evaluate(
    folder: opt.RunArgument,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    batch_size: opt.BatchSize = 32,
    threads: opt.Threads = None,
    max_new_tokens: opt.MaxNewTokens = 16,
    baselines: opt.Baselines = None,
    sweep: opt.Sweep = False,
    schedule: opt.ChosenSchedules = None,
    eval_samples: opt.FewerSamples = None,
    metric: opt.Metric = None,
    max_skipped: opt.MaxSkipped = "5%",
    trust_remote_code: opt.TrustRemoteCode = False,
) -> dict[str, Any]:
    """Step 5: schedules and their baselines against the full model, on held-out samples.

    adaptinfer-profile evaluate outputs/demo --baselines all

    adaptinfer-profile evaluate outputs/demo --schedule 25pct-processed-paper --schedule other.json

    adaptinfer-profile evaluate outputs/mine --metric anls
    """
    current = open_run(folder)
    parsing.check_baselines(baselines)
    metric = metric and parsing.choice("--metric", metric, METRIC_NAMES)
    most_skipped = parsing.fraction("--max-skipped", max_skipped)
    chosen = current.schedules.several(schedule or (), RESERVED_NAMES)
    if not chosen:
        Schedule.load(current.schedule)  # before the backbone is loaded
    loaded, data = load_again(current, device, dtype, threads, trust_remote_code)
    table = evaluate_schedule(
        current,
        loaded,
        data,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        baselines=baselines,
        sweep=sweep,
        schedules=chosen,
        most_samples=eval_samples,
        metric=metric,
        max_skipped=most_skipped,
    )
    show_evaluation(table, current)
    return {
        "run": str(folder),
        "evaluation": str(current.evaluation),
        "rows": read_rows(current.evaluation),
        "stale": note_stale(current),
    }


@command
def plot(
    folder: opt.RunArgument,
    style: Annotated[
        str, typer.Option("--style", help=f"{listed(STYLE_NAMES)}; paper: a serif as in the text of a paper.")
    ] = STYLE_NAMES[0],
    column: Annotated[
        float | None,
        typer.Option("--column-width", min=1, max=20, help="Width of a column in inches; default 3.3."),
    ] = None,
    tables: Annotated[
        bool, typer.Option("--tables", help="Also write every table as Markdown and LaTeX.")
    ] = False,
) -> dict[str, Any]:
    """Step 6: the figures (PDF and PNG) that the run has data for, each with its table.

    adaptinfer-profile plot outputs/demo --style paper --column-width 3.25 --tables
    """
    style = parsing.choice("--style", style, STYLE_NAMES)
    current = open_run(folder)
    figures = draw_figures(current, style=style, column=column)
    if tables:
        from schedule_finder.figures.tables import write_tables

        figures += write_tables(current)
    for path in figures:
        screen.print(str(path), soft_wrap=True)
    return {
        "run": str(folder),
        "figures": [str(path) for path in figures],
        "stale": note_stale(current),
    }


@command
def inspect(
    what: Annotated[
        str, typer.Argument(metavar="RUN|SCHEDULE|BACKBONE", help="Folder, schedule file or backbone.")
    ],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Of a backbone: compare pruned generation with masking, for each scorer."
        ),
    ] = False,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "auto",
    threads: opt.Threads = None,
    *,
    loading: dict[str, Any],
) -> dict[str, Any]:
    """The content of a run, a schedule file, a published preset or a backbone, as tables.

    adaptinfer-profile inspect outputs/demo

    adaptinfer-profile inspect --verify ./my-checkpoint --device cuda --dtype float32
    """
    from schedule_finder.evidence import HeldOutSummary

    path = Path(what)
    backbone = BackboneOptions(what, device, dtype, threads, LoadOptions.given(**loading))
    if verify:
        if (path / "run.json").exists() or path.is_file() or what in Schedule.presets():
            raise InputError(f"--verify {what}: is no backbone; give a checkpoint folder or a hub name")
        return _verify(what, backbone)
    if (path / "run.json").exists():
        current = open_run(path)
        show_run(current)
        note_stale(current)
        return current.document() | run_numbers(current)
    held_out = None
    if path.is_file():
        found = Schedule.load(path)
        folder = path.parent.parent if path.parent.name == "4_schedules" else path.parent
        held_out = HeldOutSummary.load(Run(folder).evaluation_summary)
    elif what in Schedule.presets():
        found = Schedule.preset(what)
    else:
        facts = _backbone_facts(backbone.load())
        show_backbone(what, facts)
        return facts
    show_schedule(found, held_out)
    return found.model_dump(mode="json")


def _verify(name: str, backbone: BackboneOptions) -> dict[str, Any]:
    """Load the backbone and check that pruning it is exact; the command fails where it is not."""
    loaded = backbone.load()
    from schedule_finder.verification import verify

    with progress_bar("verify") as progress:
        found = verify(loaded, progress=progress)
    show_verification(name, found)
    return {"backbone": name, "failed": found.verdict != "exact", **found.to_json()}


def _backbone_facts(loaded: LoadedBackbone) -> dict[str, Any]:
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
