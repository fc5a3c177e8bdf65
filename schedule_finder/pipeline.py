"""The numbered steps of a run. Each reads the files before it and writes its own, and re-runs alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from pruning_runtime import Schedule
from pruning_runtime.schedule import BudgetKind
from schedule_finder.change_points import DEFAULT_DETECTOR, DETECTORS, canonical_name
from schedule_finder.change_points.views import compare_views, detect_views
from schedule_finder.errors import InputError, OutOfReach
from schedule_finder.evaluation.evaluate import Evaluation
from schedule_finder.evaluation.example import write_example
from schedule_finder.evaluation.methods import Comparison, baseline_names, methods_to_compare
from schedule_finder.evidence import Asked, Evidence, HeldOutResult, HeldOutSummary, digest
from schedule_finder.files import write_json, write_text
from schedule_finder.measuring.unit_store import UnitStore, model_digest
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.profiling.collect import Collection
from schedule_finder.profiling.engines.base import Engine, Report
from schedule_finder.profiling.store import ProfileStore
from schedule_finder.run.folder import Run
from schedule_finder.samples import (
    BadSample,
    DataSet,
    Sample,
    SampleEntry,
    choose_samples,
    describe,
    read_entries,
    write_entries,
)
from schedule_finder.samples.skipping import MOST_SKIPPED, check_skipped, count_by_status
from schedule_finder.search import AUTO, Search
from schedule_finder.solvers import DEFAULT_SOLVER

MOST_SAMPLES = 4096
"""Where the number of samples is `auto`."""
PARETO = (0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8)
"""Budgets of the front."""

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


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
    store.open(engine.meta)
    stored = set(store.recover(report))
    collection = Collection(run.samples, entries, store, stored, progress, max_skipped, after_shard)
    with run.step("profile") as facts:
        collection.run(engine, report)
        write_entries(run.samples, entries)
        facts |= count_by_status(entries, "calibration")
    return count_by_status(entries, "calibration")


def detect_step(run: Run, detector: str | None = None) -> dict[str, Any]:
    """Step 3: change points by every detector; ``detector`` is the one the schedule will follow."""
    default = canonical_name(detector or DEFAULT_DETECTOR)
    if default not in DETECTORS:
        raise InputError(f"--detector {default!r}: choose {', '.join(DETECTORS)}")
    profile = run.profile.read()
    layers = profile.layers
    with run.step("detect", detector=default):
        found = {}
        for name, make in DETECTORS.items():
            found[name] = make().detect(profile.maps, layers=layers, seed=run.options["seed"])
        views = detect_views(
            profile.scores, profile.curves["vision_mass"], layers=layers, seed=run.options["seed"]
        )
        document = {
            "default": default,
            "samples": len(profile),
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
) -> Schedule:
    """Step 4: from the profile, its change points and measurements on the model to ``4_schedule.json``.

    Measurements are kept in ``4_measurements/``; an interrupted step continues there.
    """
    asked = {"solver": solver, "scorer": scorer, "dropped_tokens": dropped_tokens}
    with run.step("schedule", budget=budget, budget_kind=kind, **asked):
        schedule = search.solve(budget, kind, **asked)
        schedule.save(run.schedule)
    return schedule


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
    """The front over budgets: what each costs by every count, and its predicted and measured answer KL.

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
                "predicted_kl": reasons.predicted_kl,
                "measured_kl": reasons.measured_kl,
                "scorer": found.scorer.name,
                "dropped_tokens": found.dropped_tokens,
                "stages": " ".join(f"{stage.layer}:{stage.keep_ratio:.3f}" for stage in found.stages),
            }
        )
    if not rows:
        raise InputError(f"{run.folder}: none of the budgets {', '.join(map(str, budgets))} can be met")
    numbers = ("latency", "predicted_kl", "measured_kl")
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
) -> pd.DataFrame:
    """Step 5: the schedule and its baselines against the full model, on samples that search never used.

    Writes ``5_evaluation.csv``, its summary ``5_evaluation.json`` and the example for the overlay. Finished batches
    are kept in ``5_evaluation.parts/`` until then; an interrupted step continues there.

    Args:
        run: the run, with a schedule.
        loaded: the backbone.
        data: what the samples are loaded from.
        progress: called with the samples done and all samples.
        batch_size: samples per forward pass.
        max_new_tokens: longest answer.
        baselines: names as in `baseline_names`; None: the default ones.
        sweep: further budgets, each with a schedule of its own from the same profile.
        report: called with the number of generations, and with the expected time once a batch was timed.
    """
    schedule = Schedule.load(run.schedule)
    schedule.check_backbone(loaded.backbone)
    names = baseline_names(baselines, schedule)
    entries = read_entries(run.samples)
    with run.step("evaluate", max_new_tokens=max_new_tokens) as facts:
        evaluation: Evaluation | None = None
        for samples in _held_out_batches(run, data, entries, batch_size):
            if evaluation is None:
                search = Search(run, (loaded, data), batch_size=batch_size)
                methods = methods_to_compare(_comparison(loaded, schedule, samples, search), names, sweep)
                evaluation = Evaluation(
                    loaded, methods, max_new_tokens, UnitStore(run.evaluation_parts, model_digest(loaded))
                )
                evaluation.after_unit = _Forecast(len(methods) + 1, _held_out(entries), progress, report)
                write_example(run.folder, loaded, schedule, samples[0], max_new_tokens)
            evaluation.run_batch(samples)
        assert evaluation is not None  # too many unusable samples are refused before
        table = evaluation.table()
        write_text(run.evaluation, table.to_csv(index=False, float_format="%.6g"))
        _held_out_summary(schedule, table).save(run.evaluation_summary)
        write_entries(run.samples, entries)
        shutil.rmtree(run.evaluation_parts, ignore_errors=True)
        facts |= count_by_status(entries, "held_out")
    return table


def _comparison(
    loaded: LoadedBackbone, schedule: Schedule, samples: Sequence[Sample], search: Search
) -> Comparison:
    """What baselines are made from; other schedules are searched with what the user asked for."""
    evidence = Evidence.of(schedule)
    solver = evidence.solver.solver if evidence.solver else DEFAULT_SOLVER
    asked = evidence.asked or Asked(solver=solver, scorer=AUTO, dropped_tokens=AUTO)
    kind = schedule.budget.kind if schedule.budget else "processed"

    def solve(budget: float, by: str | None) -> Schedule:
        return search.solve(
            budget,
            kind,
            solver=by or asked.solver,
            scorer=asked.scorer,
            dropped_tokens=asked.dropped_tokens,
        )

    return Comparison(
        schedule=schedule,
        loaded=loaded,
        samples=samples,
        solve=solve,
        target=lambda: search.target(schedule.budget.target if schedule.budget else 1.0, kind),
        earliest=lambda: search.profile.earliest_stage,
    )


class _Forecast:
    """Progress of an evaluation in generated answers, and one line with the expected time.

    The first batch that the full model answers is the measure: no method takes much longer than the full model.
    """

    def __init__(self, methods: int, samples: int, progress: Progress, report: Report) -> None:
        self._total, self._done, self._reported = methods * samples, 0, False
        self._progress, self._report = progress, report
        report(f"evaluation: {methods} methods x {samples} samples = {self._total} generated answers")
        progress(0, self._total)

    def __call__(self, samples: int, full_seconds: float | None) -> None:
        if full_seconds is not None and not self._reported:
            self._reported = True
            left = self._total - self._done
            seconds = full_seconds / samples * left
            self._report(
                f"expected time: about {seconds:.0f} s or less for {left} answers "
                f"(the full model: {full_seconds:.2f} s for {samples})"
            )
        self._done += samples
        self._progress(self._done, self._total)


def _held_out_summary(schedule: Schedule, table: pd.DataFrame) -> HeldOutSummary:
    """All methods at the schedule's budget, over all question types."""
    budget = schedule.budget.target if schedule.budget else 1.0
    own = table[
        (table.question_type == "all") & ((table.method == "full") | np.isclose(table.budget, budget))
    ]
    names = [name for name in HeldOutResult.model_fields if name != "n"]
    return HeldOutSummary(
        schedule=digest(schedule),
        budget=budget,
        samples=int(own.n.max()),
        methods={
            row["method"]: HeldOutResult(
                n=row["n"],
                **{name: None if pd.isna(row[name]) else round(float(row[name]), 6) for name in names},
            )
            for row in own.to_dict("records")
        },
    )


def _held_out(entries: Sequence[SampleEntry]) -> int:
    return sum(entry.use == "held_out" and entry.status != "skipped" for entry in entries)


def _entries(run: Run, data: DataSet, count: int, held_out: int, seed: int) -> list[SampleEntry]:
    """The run's list of samples, chosen now if it is not yet; written in one piece, without notes beside it."""
    chosen = run.samples.exists()
    entries = read_entries(run.samples) if chosen else choose_samples(data, count, held_out, seed)
    write_entries(run.samples, entries)
    return entries


def _held_out_batches(
    run: Run, data: DataSet, entries: list[SampleEntry], batch_size: int
) -> Iterator[list[Sample]]:
    """Held-out samples in batches; notes in ``entries`` how loading went.

    Raises `InputError` where there are none or too many cannot be used.
    """
    held_out = [index for index, entry in enumerate(entries) if entry.use == "held_out"]
    if not held_out:
        raise InputError(f"{run.samples}: no held-out samples; begin a run with --eval-samples above 0")
    skipped: list[SampleEntry] = []
    for first in range(0, len(held_out), batch_size):
        samples = []
        indices = held_out[first : first + batch_size]
        for index in indices:
            try:
                sample = data.load(entries[index])
            except BadSample as error:
                entries[index] = replace(entries[index], status="skipped", reason=str(error))
                skipped.append(entries[index])
                continue
            entries[index] = replace(describe(entries[index], sample), status="done")
            samples.append(sample)
        check_skipped(skipped, first + len(indices), len(held_out))
        if samples:
            yield samples
