"""`run`, the whole job, and `profile`, its first two steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schedule_finder.cli import options as opt
from schedule_finder.cli import parsing
from schedule_finder.cli.checks import check_held_out, check_reachable, count_tokens
from schedule_finder.cli.names import (
    AUTO,
    BASELINE_NAMES,
    BUDGET_KINDS,
    DETECTOR_NAMES,
    DRAWN_BASELINES,
    NUM_DEFAULT_BASELINES,
    RANDOM_DRAWS,
    SOLVER_NAMES,
)
from schedule_finder.cli.progress import status
from schedule_finder.cli.runner import command
from schedule_finder.cli.session import BackboneOptions, EngineOptions, begin_run, open_search
from schedule_finder.cli.steps import (
    ask_first,
    draw_figures,
    evaluate_schedule,
    note_stale,
    profile_samples,
)
from schedule_finder.cli.terminal import screen
from schedule_finder.cli.terminal.evaluation import show_evaluation
from schedule_finder.cli.terminal.plan import show_plan
from schedule_finder.cli.terminal.schedule import show_detections, show_schedule
from schedule_finder.models.load_options import LoadOptions
from schedule_finder.run.numbers import run_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from schedule_finder.profiling.engines.base import Engine
    from schedule_finder.run.folder import Run
    from schedule_finder.samples import DataSet, SampleEntry


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
    dry_run: opt.DryRun = False,
    *,
    columns: dict[str, Any],
    loading: dict[str, Any],
) -> dict[str, Any]:
    """All steps: profile, detect, schedule, evaluate, plot.

    adaptinfer-profile run demo

    adaptinfer-profile run ./my-llava --dataset data.jsonl --samples 64 --out outputs/mine

    adaptinfer-profile run ./my-llava --dataset pope --dataset textvqa --budget 25%

    adaptinfer-profile run ./my-llava --dataset data.jsonl --dry-run
    """
    kind = parsing.budget_kind(budget_kind)
    parsing.check_budget(budget, kind)
    detector = detector and parsing.choice("--detector", detector, DETECTOR_NAMES)
    asked = parsing.solver_options(solver, scorer, dropped_tokens)
    most_skipped = parsing.fraction("--max-skipped", max_skipped)
    parsing.check_baselines(baselines)
    model = BackboneOptions(backbone, device, dtype, threads, LoadOptions.given(**loading))
    planned: list[SampleEntry] = []

    def check(run: Run, running: Engine, data: DataSet) -> None:
        count = parsing.number_of_samples(samples)
        planned.extend(pipeline.planned_entries(run, data, count, eval_samples, seed))
        calibration = [entry for entry in planned if entry.use == "calibration"]
        check_reachable(running, count_tokens(running, data, calibration), budget, kind, asked["solver"])
        check_held_out(data, planned if eval_samples else ())

    from schedule_finder import pipeline

    batches = EngineOptions(
        "local" if dry_run else engine, None if dry_run else workers, batch_size, batch_tokens
    )
    current, running, data = begin_run(
        model, batches, dataset=dataset, samples=samples, eval_samples=eval_samples, seed=seed, columns=columns,
        out=out, check=check, write=not dry_run,
    )  # fmt: skip
    if dry_run:
        methods = _number_of_methods(baselines) if eval_samples else 0
        share = parsing.fraction("--budget", budget) if kind == "processed" else None
        work = {"solver": asked["solver"], "budget": share, "methods": methods}
        return _plan(running, data, planned, batches, max_new_tokens=max_new_tokens, **work)

    if running.loaded is not None:  # workers of a cluster keep their backbones
        ask_first(current, running.loaded, data, batch_size, max_new_tokens)
    with running:
        profile_samples(current, running, data, most_skipped)
    show_detections(pipeline.detect_step(current, detector))
    loaded = running.loaded or model.load()
    if running.loaded is None:
        ask_first(current, loaded, data, batch_size, max_new_tokens)
    with open_search(current, (loaded, data), batch_size) as search:
        fraction = parsing.budget_fraction(budget, search)
        found = pipeline.schedule_step(current, search, budget=fraction, kind=kind, **asked)
    show_schedule(found.schedule)
    evaluated = None
    if eval_samples:
        evaluated = evaluate_schedule(
            current, loaded, data, batch_size=batch_size, max_new_tokens=max_new_tokens, baselines=baselines, sweep=sweep
        )  # fmt: skip
    return _finish(current, evaluated)


def _number_of_methods(baselines: str | None) -> int:
    """The full model, the schedule and its baselines, random ones once per draw; some may not apply later."""
    if baselines is None:
        return 2 + NUM_DEFAULT_BASELINES - 1 + RANDOM_DRAWS  # one of the default ones is `random`
    names = BASELINE_NAMES if baselines == "all" else () if baselines == "none" else baselines.split(",")
    return 2 + sum(RANDOM_DRAWS if name.strip() in DRAWN_BASELINES else 1 for name in names)


def _plan(
    running: Engine,
    data: DataSet,
    planned: Sequence[SampleEntry],
    batches: EngineOptions,
    **work: Any,
) -> dict[str, Any]:
    """Time a few batches, and show and return the work ahead; ``work`` is passed to `plan_run`."""
    from schedule_finder.profiling.engines.base import BatchLimits
    from schedule_finder.work_ahead import plan_run

    assert running.loaded is not None  # the local engine's
    limits = BatchLimits(samples=batches.batch_size, tokens=batches.batch_tokens)
    with status("timing a few batches"):
        plan = plan_run(running.loaded, data, planned, limits, **work)
    show_plan(plan)
    return {"dry_run": True, **plan}


def _finish(current: Run, evaluated: pd.DataFrame | None) -> dict[str, Any]:
    """Draw the figures, and show and return where everything is."""
    figures = draw_figures(current)
    if evaluated is not None:
        show_evaluation(evaluated, current)
    screen.print(f"schedule: [bold]{current.schedule}[/bold]", soft_wrap=True)
    note_stale(current)
    screen.print(f"figures:  [bold]{current.figures}[/bold] ({len(figures)} files)", soft_wrap=True)
    return {
        "run": str(current.folder),
        "schedule": str(current.schedule),
        "evaluation": str(current.evaluation) if evaluated is not None else None,
        "figures": [str(path) for path in figures],
        "numbers": run_numbers(current),
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
    loading: dict[str, Any],
) -> dict[str, Any]:
    """Steps 1 and 2: choose samples and record the attention to their vision tokens, layer by layer. Resumes."""
    most_skipped = parsing.fraction("--max-skipped", max_skipped)
    current, running, data = begin_run(
        BackboneOptions(backbone, device, dtype, threads, LoadOptions.given(**loading)),
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
