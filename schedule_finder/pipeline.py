"""The numbered steps of a run. Each reads the files before it and writes its own, and re-runs alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pandas as pd

from pruning_runtime.errors import ScheduleError
from pruning_runtime.schedule import BudgetKind, Schedule
from schedule_finder.errors import InputError, OutOfReach
from schedule_finder.evidence import AnswerQuality, Evidence
from schedule_finder.files import refuse_folders, write_json, write_text
from schedule_finder.profiling.collect import Collection
from schedule_finder.profiling.engines.base import Engine, Report
from schedule_finder.profiling.store import ProfileStore
from schedule_finder.run.folder import Run
from schedule_finder.run.schedules import NamedSchedule
from schedule_finder.samples import (
    DataSet,
    SampleEntry,
    choose_samples,
    read_entries,
    shortage,
    write_entries,
)
from schedule_finder.samples.skipping import MOST_SKIPPED, count_by_status
from schedule_finder.search import AUTO, Search
from schedule_finder.solvers import DEFAULT_SOLVER

if TYPE_CHECKING:
    from schedule_finder.evaluation.evaluate import Evaluation
    from schedule_finder.evaluation.methods import Method
    from schedule_finder.models.loading import LoadedBackbone

MOST_SAMPLES = 4096
"""Where the number of samples is `auto`."""
FIGURES_OF_EVALUATION = ("4_pareto", "5_*", "6_overlay")
"""Figures that show results of step 5."""
PARETO = (0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8)
"""Budgets of the front."""

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


def planned_entries(run: Run, data: DataSet, count: int | str, held_out: int, seed: int) -> list[SampleEntry]:
    """The list of samples of a run, chosen now if it is not yet. Writes nothing."""
    if run.samples.exists():
        return read_entries(run.samples)
    return choose_samples(data, MOST_SAMPLES if count == AUTO else int(count), held_out, seed)


def first_answers_step(
    run: Run, loaded: LoadedBackbone, data: DataSet, *, batch_size: int, max_new_tokens: int, report: Report
) -> None:
    """Before the long part: a few answers of the full model, and a warning where they are suspicious.

    Writes ``1_first_answers.json``; a run that has the file repeats its warning only. Nothing is refused: a data set
    may be hard, and the search needs no reference answers.
    """
    from schedule_finder.evaluation.first_answers import ask_full_model, first_samples

    quality = AnswerQuality.load(run.first_answers)
    if quality is None:
        options = run.options
        count = MOST_SAMPLES if options["samples"] == AUTO else options["samples"]
        entries = _entries(run, data, count, options["eval_samples"], options["seed"])
        samples = first_samples(data, entries)
        if not samples:
            return  # the profile refuses a data set that cannot be read
        quality = ask_full_model(loaded, samples, batch_size, max_new_tokens, options.get("metric"))
        quality.save(run.first_answers)
    for line in quality.lines():
        report(line)


def profile_step(
    run: Run,
    engine: Engine,
    data: DataSet,
    progress: Progress,
    *,
    report: Report,
    max_skipped: float = MOST_SKIPPED,
    after_shard: Callable[[ProfileStore], bool] | None = None,
) -> dict[str, Any]:
    """Steps 1 and 2: choose samples, run them through the backbone, store their profiles.

    Samples that are stored or were skipped are not done again; the profile is the same, bit by bit, however
    often this was interrupted.

    Args:
        run: the run's folder.
        engine: what runs the samples.
        data: what the samples are chosen from.
        progress: called with the samples done and all samples.
        report: called with a line about each thing that was repaired on the way.
        max_skipped: share of the samples that may be unusable; beyond it the step stops.
        after_shard: called with the store at the start and when all of a chunk's samples are in it; True ends the
            step there.

    Returns:
        Counts by status.

    Raises:
        InputError: too many samples cannot be used, or nothing can be written.
        StoreError: the folder holds a profile of something else.
    """
    options = run.options
    count = MOST_SAMPLES if options["samples"] == AUTO else options["samples"]
    entries = _entries(run, data, count, options["eval_samples"], options["seed"])
    store = run.profile
    store.open(engine.meta, report)
    if line := shortage(entries, options["samples"], options["eval_samples"]):
        report(line)
    stored = set(store.recover(report))
    collection = Collection(run.samples, entries, store, stored, progress, max_skipped, after_shard)
    with run.step("profile") as facts:
        collection.run(engine, report)
        write_entries(run.samples, entries)
        facts |= count_by_status(entries, "calibration")
    return count_by_status(entries, "calibration")


def detect_step(run: Run, detector: str | None = None) -> dict[str, Any]:
    """Step 3: change points by every detector; ``detector`` is the one the schedule will follow."""
    # Here: scipy and ruptures take half a second to import.
    from schedule_finder.change_points import DEFAULT_DETECTOR, DETECTORS, canonical_name
    from schedule_finder.change_points.views import MAIN_VIEW, compare_views, detect_views

    default = canonical_name(detector or DEFAULT_DETECTOR)
    if default not in DETECTORS:
        raise InputError(f"--detector {default!r}: choose {', '.join(DETECTORS)}")
    store, seed = run.profile, run.options["seed"]
    mass = store.curve("vision_mass")
    layers = list(store.meta()["layers"])
    with run.step("detect", detector=default):
        # Maps are read shard by shard, once for each result: a profile may be larger than the memory.
        found = {
            name: make().detect(store.scores(MAIN_VIEW), layers=layers, seed=seed)
            for name, make in DETECTORS.items()
        }
        views = detect_views(store.scores("text_guided"), mass, layers=layers, seed=seed)
        document = {
            "default": default,
            "samples": len(mass),
            "layers": layers,
            "detectors": {name: detection.to_json() for name, detection in found.items()},
            "views": {name: view.to_json() for name, view in views.items()},
            "agreement": compare_views(
                found[DEFAULT_DETECTOR].change_points,
                {name: view.change_points for name, view in views.items()},
            ),
        }
        write_json(run.change_points, document)
    return document


def schedule_step(
    run: Run,
    search: Search,
    *,
    budget: float,
    kind: BudgetKind = "processed",
    solver: str = DEFAULT_SOLVER,
    scorer: str = AUTO,
    dropped_tokens: str = AUTO,
    name: str | None = None,
) -> NamedSchedule:
    """Step 4: from the profile, its change points and measurements on the model to a schedule.

    The schedule is kept in ``4_schedules/`` under ``name`` (None: `default_name`) and selected: ``4_schedule.json``.
    Measurements are kept in ``4_measurements/``; an interrupted step continues there.
    """
    asked = {"solver": solver, "scorer": scorer, "dropped_tokens": dropped_tokens}
    with run.step("schedule", budget=budget, budget_kind=kind, **asked) as facts:
        kept = run.schedules.keep(search.solve(budget, kind, **asked), name)
        facts["name"] = kept.name
    return kept


def pareto_step(
    run: Run,
    search: Search,
    *,
    kind: BudgetKind = "processed",
    solver: str = DEFAULT_SOLVER,
    scorer: str = AUTO,
    dropped_tokens: str = AUTO,
    budgets: Sequence[float] = PARETO,
) -> pd.DataFrame:
    """The front over budgets: what each costs by every count, and its predicted and measured answer change.

    Writes ``4_pareto.csv``. Budgets that no stages can meet are left out.
    """
    rows = []
    for budget in budgets:
        try:
            found = search.solve(budget, kind, solver=solver, scorer=scorer, dropped_tokens=dropped_tokens)
        except OutOfReach:
            continue
        reasons = Evidence.of(found).solver
        assert found.budget is not None
        assert reasons is not None
        rows.append(
            {
                "budget_kind": kind,
                "budget": budget,
                **found.budget.model_dump(include={"processed", "published", "flops", "kv", "latency"}),
                "predicted_change": reasons.predicted_change,
                "measured_change": reasons.measured_change,
                "measured_kl": reasons.measured_kl,
                "scorer": found.scorer.name,
                "dropped_tokens": found.dropped_tokens,
                "stages": " ".join(f"{stage.layer}:{stage.keep_ratio:.3f}" for stage in found.stages),
            }
        )
    if not rows:
        raise InputError(f"{run.folder}: none of the budgets {', '.join(map(str, budgets))} can be met")
    numbers = ("latency", "predicted_change", "measured_change", "measured_kl")
    table = pd.DataFrame(rows).astype(dict.fromkeys(numbers, float))
    write_text(run.pareto, table.to_csv(index=False, float_format="%.6g"))
    return table


def evaluate_step(
    run: Run,
    loaded: LoadedBackbone,
    data: DataSet,
    progress: Progress,
    *,
    batch_size: int,
    max_new_tokens: int = 16,
    baselines: str | None = None,
    sweep: Sequence[float] = (),
    report: Report = lambda _line: None,
    schedules: Sequence[NamedSchedule] = (),
    most_samples: int | None = None,
    metric: str | None = None,
    max_skipped: float = MOST_SKIPPED,
) -> pd.DataFrame:
    """Step 5: schedules and their baselines against the full model, on samples that search never used.

    Writes ``5_answers.parquet``, ``5_evaluation.csv``, its summary ``5_evaluation.json``, the overlay's example, and
    ``5_allocation.csv``, the attention of the full model by layer; removes figures of an earlier evaluation.
    An interrupted step continues with the batches in ``5_evaluation.parts/``.

    Args:
        run, loaded, data: the run (with a schedule if ``schedules`` is empty), its backbone and data set.
        progress: called with the answers done and all answers.
        batch_size, max_new_tokens: samples per forward pass; longest answer.
        baselines: names as in `baseline_names`; None: the default ones.
        sweep: further budgets, each with a schedule of its own from the same profile.
        report: called with the number of generations, and with the expected time once a batch was timed.
        schedules: evaluated under their names, each with baselines; empty: the selected one, as ``schedule``.
        most_samples: use the first held-out samples only; None: all.
        metric: judges the answers; None: the run's (``--metric`` of `run`), else that of each sample's data set.
        max_skipped: share of the samples that may be unusable; beyond it the step stops.
    """
    from schedule_finder.evaluation.allocation import write_allocation
    from schedule_finder.evaluation.example import write_example
    from schedule_finder.evaluation.held_out import held_out_batches, methods_for

    chosen, entries = list(schedules) or [_selected(run)], read_entries(run.samples)
    _check_evaluation(run, loaded, chosen, baselines)
    first = _first(run, chosen)
    with run.step("evaluate", max_new_tokens=max_new_tokens, schedules=[one.name for one in chosen]) as facts:
        evaluation: Evaluation | None = None
        for samples in held_out_batches(run, data, entries, batch_size, most_samples, max_skipped):
            if evaluation is None:
                search = Search(run, (loaded, data), batch_size=batch_size)
                asked = chosen, baselines, sweep, bool(schedules)
                methods = methods_for(loaded, samples, search, *asked, report)
                wanted = most_samples or _held_out(entries)
                evaluation = _evaluation(run, loaded, methods, max_new_tokens, wanted, progress, report)
                evaluation.metric = metric or run.options.get("metric")
                write_example(run.folder, loaded, first.schedule, samples[0], max_new_tokens)
                write_allocation(run.allocation, loaded, samples, max_new_tokens)
            evaluation.run_batch(samples)
        assert evaluation is not None  # too many unusable samples are refused before
        table = _write_evaluation(run, evaluation, first, chosen, report)
        write_entries(run.samples, entries)
        shutil.rmtree(run.evaluation_parts, ignore_errors=True)
        facts |= count_by_status(entries, "held_out")
    return table


def _check_evaluation(
    run: Run, loaded: LoadedBackbone, chosen: Sequence[NamedSchedule], baselines: str | None
) -> None:
    """Refuse what would fail after the answers were generated. Raises `InputError` or an error of the runtime."""
    from schedule_finder.evaluation.methods import baseline_names

    for one in chosen:
        one.schedule.check_backbone(loaded.backbone)
        baseline_names(baselines, one.schedule)
    refuse_folders(run.answers, run.evaluation, run.evaluation_summary, run.allocation)


def viewer_step(run: Run, loaded: LoadedBackbone, data: DataSet, progress: Progress) -> int:
    """Step 7, first part: the samples of the report's viewer; returns their number.

    Writes ``7_viewer.json``. Raises `InputError` where the selected schedule was not evaluated.
    """
    from schedule_finder.report.recording import record_viewer

    with run.step("viewer") as facts:
        viewer = record_viewer(run, loaded, data, progress)
        viewer.save(run.viewer)
        facts["samples"] = len(viewer.samples)
    return len(viewer.samples)


def _write_evaluation(
    run: Run, evaluation: Evaluation, first: NamedSchedule, chosen: Sequence[NamedSchedule], report: Report
) -> pd.DataFrame:
    """Write answers, table and summary, and report what they do not show; figures of an earlier one are removed."""
    from schedule_finder.evaluation.remarks import remarks
    from schedule_finder.evaluation.summary import summarize

    table, quality = evaluation.table(), evaluation.full_model()
    evaluation.write_answers(run.answers)
    write_text(run.evaluation, table.to_csv(index=False, float_format="%.6g"))
    summarize(first, chosen, table, quality).save(run.evaluation_summary)
    for line in (*quality.lines(), *remarks(table)):
        report(line)
    if run.forget_figures(FIGURES_OF_EVALUATION):
        report(
            f"figures of an earlier evaluation are removed; draw them with `adaptinfer-profile plot {run.folder}`"
        )
    return table


def _evaluation(
    run: Run,
    loaded: LoadedBackbone,
    methods: list[Method],
    max_new_tokens: int,
    samples: int,
    progress: Progress,
    report: Report,
) -> Evaluation:
    """An evaluation that keeps finished batches in the run folder and forecasts its time."""
    from schedule_finder.evaluation.evaluate import Evaluation
    from schedule_finder.evaluation.forecast import Forecast
    from schedule_finder.measuring.unit_store import UnitStore, model_digest

    store = UnitStore(run.evaluation_parts, model_digest(loaded))
    evaluation = Evaluation(loaded, methods, max_new_tokens, store)
    evaluation.after_unit = Forecast(len(methods) + 1, samples, progress, report)
    return evaluation


def _selected(run: Run) -> NamedSchedule:
    """The selected schedule. Raises `ScheduleError` where there is none."""
    selected = run.schedules.selected()
    return NamedSchedule("schedule", Schedule.load(run.schedule)) if selected is None else selected


def _first(run: Run, chosen: Sequence[NamedSchedule]) -> NamedSchedule:
    """The schedule that the example and the head of the summary are of: the selected one, or the first."""
    with suppress(ScheduleError, InputError):
        selected = run.schedules.selected()
        return next((one for one in chosen if selected and one.digest == selected.digest), chosen[0])
    return chosen[0]


def _held_out(entries: Sequence[SampleEntry]) -> int:
    return sum(entry.use == "held_out" and entry.status != "skipped" for entry in entries)


def _entries(run: Run, data: DataSet, count: int, held_out: int, seed: int) -> list[SampleEntry]:
    """The run's list of samples, written in one piece, without notes beside it."""
    entries = planned_entries(run, data, count, held_out, seed)
    write_entries(run.samples, entries)
    return entries
