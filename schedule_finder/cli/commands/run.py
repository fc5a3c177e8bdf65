"""`run`, the whole job, and `profile`, its first two steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schedule_finder.cli import options as opt
from schedule_finder.cli import parsing
from schedule_finder.cli.names import AUTO, BUDGET_KINDS, DETECTOR_NAMES, SOLVER_NAMES
from schedule_finder.cli.runner import command
from schedule_finder.cli.session import BackboneOptions, EngineOptions, begin_run, open_search
from schedule_finder.cli.steps import draw_figures, evaluate_schedule, profile_samples
from schedule_finder.cli.terminal import screen
from schedule_finder.cli.terminal.evaluation import show_evaluation
from schedule_finder.cli.terminal.schedule import show_detections, show_schedule

if TYPE_CHECKING:
    import pandas as pd

    from schedule_finder.run.folder import Run


@command
def run(
    backbone: opt.Backbone = "demo",
    dataset: opt.Dataset = None,
    samples: opt.Samples = "1000",
    eval_samples: opt.EvalSamples = 450,
    budget: opt.Budget = opt.DEFAULT_BUDGET,
    budget_kind: opt.BudgetKindOption = BUDGET_KINDS[0],
    solver: opt.Solver = SOLVER_NAMES[0],
    scorer: opt.Scorer = AUTO,
    dropped_tokens: opt.DroppedTokensOption = AUTO,
    detector: opt.Detector = None,
    out: opt.Out = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    batch_size: opt.BatchSize = 32,
    batch_tokens: opt.BatchTokens = 16384,
    max_skipped: opt.MaxSkipped = "5%",
    engine: opt.EngineName = "local",
    workers: opt.Workers = None,
    seed: opt.Seed = 0,
    threads: opt.Threads = None,
    max_new_tokens: opt.MaxNewTokens = 16,
    baselines: opt.Baselines = None,
    sweep: opt.Sweep = False,
    *,
    columns: dict[str, Any],
) -> dict[str, Any]:
    """All steps: profile, detect, schedule, evaluate, plot.

    adaptinfer-profile run demo

    adaptinfer-profile run ./my-llava --dataset data.jsonl --samples 64 --out outputs/mine

    adaptinfer-profile run ./my-llava --dataset pope --dataset textvqa --budget 25%
    """
    kind = parsing.budget_kind(budget_kind)
    parsing.check_budget(budget, kind)
    detector = detector and parsing.choice("--detector", detector, DETECTOR_NAMES)
    asked = parsing.solver_options(solver, scorer, dropped_tokens)
    most_skipped = parsing.fraction("--max-skipped", max_skipped)
    model = BackboneOptions(backbone, device, dtype, threads)
    current, running, data = begin_run(
        model, EngineOptions(engine, workers, batch_size, batch_tokens), dataset=dataset, samples=samples,
        eval_samples=eval_samples, seed=seed, columns=columns, out=out,
    )  # fmt: skip
    from schedule_finder import pipeline

    with running:
        profile_samples(current, running, data, most_skipped)
    show_detections(pipeline.detect_step(current, detector))
    loaded = running.loaded or model.load()  # workers of a cluster keep their backbones
    with open_search(current, (loaded, data), batch_size) as search:
        fraction = parsing.budget_fraction(budget, search)
        show_schedule(pipeline.schedule_step(current, search, budget=fraction, kind=kind, **asked))
    evaluated = None
    if eval_samples:
        evaluated = evaluate_schedule(
            current, loaded, data, batch_size=batch_size, max_new_tokens=max_new_tokens, baselines=baselines, sweep=sweep
        )  # fmt: skip
    return _finish(current, evaluated)


def _finish(current: Run, evaluated: pd.DataFrame | None) -> dict[str, Any]:
    """Draw the figures, and show and return where everything is."""
    figures = draw_figures(current)
    if evaluated is not None:
        show_evaluation(evaluated, current)
    screen.print(f"schedule: [bold]{current.schedule}[/bold]", soft_wrap=True)
    screen.print(f"figures:  [bold]{current.figures}[/bold] ({len(figures)} files)", soft_wrap=True)
    return {
        "run": str(current.folder),
        "schedule": str(current.schedule),
        "evaluation": str(current.evaluation) if evaluated is not None else None,
        "figures": [str(path) for path in figures],
    }


@command
def profile(
    backbone: opt.Backbone = "demo",
    dataset: opt.Dataset = None,
    samples: opt.Samples = "1000",
    eval_samples: opt.EvalSamples = 450,
    out: opt.Out = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    batch_size: opt.BatchSize = 32,
    batch_tokens: opt.BatchTokens = 16384,
    max_skipped: opt.MaxSkipped = "5%",
    engine: opt.EngineName = "local",
    workers: opt.Workers = None,
    seed: opt.Seed = 0,
    threads: opt.Threads = None,
    *,
    columns: dict[str, Any],
) -> dict[str, Any]:
    """Steps 1 and 2: choose samples and record the attention to their vision tokens, layer by layer. Resumes."""
    most_skipped = parsing.fraction("--max-skipped", max_skipped)
    current, running, data = begin_run(
        BackboneOptions(backbone, device, dtype, threads),
        EngineOptions(engine, workers, batch_size, batch_tokens),
        dataset=dataset,
        samples=samples,
        eval_samples=eval_samples,
        seed=seed,
        columns=columns,
        out=out,
    )
    with running:
        counts = profile_samples(current, running, data, most_skipped)
    screen.print(f"profile: {current.profile.folder}")
    return {"run": str(current.folder), **counts}
