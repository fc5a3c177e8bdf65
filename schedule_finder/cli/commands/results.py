"""`evaluate`, `plot` and `inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schedule_finder.cli import options as opt
from schedule_finder.cli.runner import command
from schedule_finder.cli.session import BackboneOptions, load_again, open_run
from schedule_finder.cli.steps import draw_figures, evaluate_schedule
from schedule_finder.cli.terminal import screen
from schedule_finder.cli.terminal.evaluation import show_evaluation
from schedule_finder.cli.terminal.run import show_backbone, show_run
from schedule_finder.cli.terminal.schedule import show_schedule
from schedule_finder.run.folder import Run

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
) -> dict[str, Any]:
    """Step 5: the schedule and its baselines against the full model, on held-out samples."""
    current = open_run(folder)
    loaded, data = load_again(current, device, dtype, threads)
    table = evaluate_schedule(
        current,
        loaded,
        data,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        baselines=baselines,
        sweep=sweep,
    )
    show_evaluation(table, current)
    return {"run": str(folder), "evaluation": str(current.evaluation)}


@command
def plot(folder: opt.RunArgument) -> dict[str, Any]:
    """Step 6: the figures (PDF and PNG) that the run has data for, each with its table."""
    figures = draw_figures(open_run(folder))
    for path in figures:
        screen.print(str(path), soft_wrap=True)
    return {"run": str(folder), "figures": [str(path) for path in figures]}


@command
def inspect(
    what: Annotated[
        str, typer.Argument(metavar="RUN|SCHEDULE|BACKBONE", help="Folder, schedule file or backbone.")
    ],
) -> dict[str, Any]:
    """The content of a run, a schedule file, a published preset or a backbone, as tables."""
    from pruning_runtime.schedule import Schedule
    from schedule_finder.evidence import HeldOutSummary

    path = Path(what)
    if (path / "run.json").exists():
        current = open_run(path)
        show_run(current)
        return current.document()
    held_out = None
    if path.is_file():
        found = Schedule.load(path)
        held_out = HeldOutSummary.load(Run(path.parent).evaluation_summary)
    elif what in Schedule.presets():
        found = Schedule.preset(what)
    else:
        facts = _backbone_facts(BackboneOptions(what, "cpu", "auto", None).load())
        show_backbone(what, facts)
        return facts
    show_schedule(found, held_out)
    return found.model_dump(mode="json")


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
