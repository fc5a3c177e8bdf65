"""`run`, the whole job, and `profile`, its first two steps."""

from __future__ import annotations

from dataclasses import dataclass
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
    METRIC_NAMES,
    NUM_DEFAULT_BASELINES,
    RANDOM_DRAWS,
    SOLVER_NAMES,
)
from schedule_finder.cli.progress import note, status
from schedule_finder.cli.runner import command
from schedule_finder.cli.session import BackboneOptions, EngineOptions, begin_run, open_search
from schedule_finder.cli.steps import (
    ask_first,
    draw_figures,
    evaluate_schedule,
    note_stale,
    profile_samples,
    record_viewer,
    write_reports,
)
from schedule_finder.cli.terminal import screen
from schedule_finder.cli.terminal.evaluation import show_evaluation
from schedule_finder.cli.terminal.plan import show_plan
from schedule_finder.cli.terminal.schedule import show_detections, show_schedule
from schedule_finder.measuring.token_policy import ANSWER_TOKENS
from schedule_finder.models.load_options import LoadOptions
from schedule_finder.profiling.fields import MOST_QUERIES
from schedule_finder.run.numbers import run_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import pandas as pd

    from pruning_runtime.schedule import BudgetKind
    from schedule_finder.models.loading import LoadedBackbone
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
    answer_tokens: opt.AnswerTokens = None,
    detector: opt.Detector = None,
    out: opt.Out = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    batch_size: opt.BatchSize = 32,
    batch_tokens: opt.BatchTokens = None,
    text_queries: opt.TextQueries = str(MOST_QUERIES),
    max_skipped: opt.MaxSkipped = "5%",
    engine: opt.EngineName = "local",
    workers: opt.Workers = None,
    seed: opt.Seed = 0,
    threads: opt.Threads = None,
    max_new_tokens: opt.MaxNewTokens = 16,
    baselines: opt.Baselines = None,
    sweep: opt.Sweep = False,
    metric: opt.Metric = None,
    dry_run: opt.DryRun = False,
    *,
    columns: dict[str, Any],
    loading: dict[str, Any],
) -> dict[str, Any]:
    """All steps: profile, detect, schedule, evaluate, plot, report.

    adaptinfer-profile run ./my-llava --dataset data.jsonl --samples 64 --out outputs/mine
    """
    kind = parsing.budget_kind(budget_kind)
    parsing.check_budget(budget, kind)
    detector = detector and parsing.choice("--detector", detector, DETECTOR_NAMES)
    metric = metric and parsing.choice("--metric", metric, METRIC_NAMES)
    asked = parsing.solver_options(solver, scorer, dropped_tokens)
    most_skipped = parsing.fraction("--max-skipped", max_skipped)
    parsing.check_baselines(baselines)
    model = BackboneOptions(backbone, device, dtype, threads, LoadOptions.given(**loading))
    planned: list[SampleEntry] = []
    check = _checks(planned, samples, eval_samples, seed, budget, kind, asked["solver"], most_skipped)
    queries = parsing.number_or_all("--text-queries", text_queries)
    where = ("local", None) if dry_run else (engine, workers)
    batches = EngineOptions(*where, batch_size, batch_tokens, queries)
    current, running, data = begin_run(
        model, batches, dataset=dataset, samples=samples, eval_samples=eval_samples, seed=seed, columns=columns,
        out=out, check=check, write=not dry_run, metric=metric,
    )  # fmt: skip
    opened = Opened(current, running, data, model, batches, max_new_tokens, answer_tokens, most_skipped)
    if dry_run:
        methods = _number_of_methods(baselines) if eval_samples else 0
        return _plan(opened, planned, solver=asked["solver"], budget=_share(budget, kind), methods=methods)
    loaded = _profile_and_detect(opened, detector)
    _find_schedule(opened, loaded, budget, kind, asked)
    return _finish(opened, loaded, _evaluate(opened, loaded, baselines, sweep) if eval_samples else None)


@dataclass(frozen=True)
class Opened:
    """A run with everything that its steps need."""

    run: Run
    engine: Engine
    data: DataSet
    model: BackboneOptions
    batches: EngineOptions
    max_new_tokens: int
    answer_tokens: int | None
    most_skipped: float


def _checks(
    planned: list[SampleEntry],
    samples: str,
    eval_samples: int,
    seed: int,
    budget: str,
    kind: BudgetKind,
    solver: str,
    most_skipped: float,
) -> Callable[[Run, Engine, DataSet], None]:
    """What is checked once backbone and data are open, before anything is written; fills ``planned``."""

    def check(run: Run, running: Engine, data: DataSet) -> None:
        from schedule_finder import pipeline

        count = parsing.number_of_samples(samples)
        planned.extend(pipeline.planned_entries(run, data, count, eval_samples, seed))
        calibration = [entry for entry in planned if entry.use == "calibration"]
        check_reachable(running, count_tokens(running, data, calibration), budget, kind, solver)
        check_held_out(data, planned if eval_samples else (), most_skipped)

    return check


def _profile_and_detect(opened: Opened, detector: str | None) -> LoadedBackbone:
    """Steps 1 to 3, and the full model's first answers. Returns the backbone for the steps that measure."""
    from schedule_finder import pipeline

    current, running, data = opened.run, opened.engine, opened.data
    limits = opened.batches.batch_size, opened.max_new_tokens
    if running.loaded is not None:  # workers of a cluster keep their backbones
        ask_first(current, running.loaded, data, *limits)
    with running:
        profile_samples(current, running, data, opened.most_skipped)
    show_detections(pipeline.detect_step(current, detector))
    loaded = running.loaded or opened.model.load()
    if running.loaded is None:
        ask_first(current, loaded, data, *limits)
    return loaded


def _find_schedule(
    opened: Opened, loaded: LoadedBackbone, budget: str, kind: BudgetKind, asked: dict[str, Any]
) -> None:
    """Step 4, with its table."""
    from schedule_finder import pipeline

    model = loaded, opened.data
    with open_search(opened.run, model, opened.batches.batch_size, opened.answer_tokens) as search:
        fraction = parsing.budget_fraction(budget, search)
        found = pipeline.schedule_step(opened.run, search, budget=fraction, kind=kind, **asked)
    show_schedule(found.schedule)


def _evaluate(opened: Opened, loaded: LoadedBackbone, baselines: str | None, sweep: bool) -> pd.DataFrame:
    """Step 5."""
    return evaluate_schedule(
        opened.run,
        loaded,
        opened.data,
        batch_size=opened.batches.batch_size,
        max_new_tokens=opened.max_new_tokens,
        baselines=baselines,
        sweep=sweep,
        max_skipped=opened.most_skipped,
    )


def _number_of_methods(baselines: str | None) -> int:
    """The full model, the schedule and its baselines, random ones once per draw; some may not apply later."""
    if baselines is None:
        return 2 + NUM_DEFAULT_BASELINES - 1 + RANDOM_DRAWS  # one of the default ones is `random`
    names = BASELINE_NAMES if baselines == "all" else () if baselines == "none" else baselines.split(",")
    return 2 + sum(RANDOM_DRAWS if name.strip() in DRAWN_BASELINES else 1 for name in names)


def _share(budget: str, kind: BudgetKind) -> float | None:
    """The share of vision tokens that is asked for; None where the budget is of another kind."""
    return parsing.fraction("--budget", budget) if kind == "processed" else None


def _plan(opened: Opened, planned: Sequence[SampleEntry], **work: Any) -> dict[str, Any]:
    """Time a few batches, and show and return the work ahead; ``work`` is passed to `plan_run`."""
    from schedule_finder.work_ahead import plan_run

    loaded = opened.engine.loaded
    assert loaded is not None  # the local engine's
    limits = opened.batches.limits
    with status("timing a few batches"):
        work |= {
            "max_new_tokens": opened.max_new_tokens,
            "answer_tokens": opened.answer_tokens or ANSWER_TOKENS,
        }
        plan = plan_run(loaded, opened.data, planned, limits, **work)
    show_plan(plan)
    return {"dry_run": True, **plan}


def _finish(opened: Opened, loaded: LoadedBackbone, evaluated: pd.DataFrame | None) -> dict[str, Any]:
    """Draw the figures, write the report, and show and return where everything is."""
    current = opened.run
    if evaluated is not None:
        record_viewer(current, loaded, opened.data)
    figures = draw_figures(current)
    report = _report(current)
    if evaluated is not None:
        show_evaluation(evaluated, current)
    screen.print(f"schedule: [bold]{current.schedule}[/bold]", soft_wrap=True)
    note_stale(current)
    screen.print(f"figures:  [bold]{current.figures}[/bold] ({len(figures)} files)", soft_wrap=True)
    if report is not None:
        screen.print(f"report:   [bold]{report}[/bold]", soft_wrap=True)
    return {
        "run": str(current.folder),
        "schedule": str(current.schedule),
        "evaluation": str(current.evaluation) if evaluated is not None else None,
        "figures": [str(path) for path in figures],
        "report": None if report is None else str(report),
        "numbers": run_numbers(current),
    }


def _report(current: Run) -> Path | None:
    """Step 7; None, with a note, where its packages are not installed."""
    from schedule_finder.report import missing_packages

    if missing := missing_packages():
        note(f"no report.html: it needs {', '.join(missing)} (pip install 'adaptinfer[report]')")
        return None
    return write_reports([current], current.report)


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
    batch_tokens: opt.BatchTokens = None,
    text_queries: opt.TextQueries = str(MOST_QUERIES),
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
    queries = parsing.number_or_all("--text-queries", text_queries)
    current, running, data = begin_run(
        BackboneOptions(backbone, device, dtype, threads, LoadOptions.given(**loading)),
        EngineOptions(engine, workers, batch_size, batch_tokens, queries),
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
