"""The numbered steps of a run. Each reads the files before it and writes its own, and re-runs alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from pruning_runtime import Schedule, pruned
from pruning_runtime.schedule import BudgetKind
from schedule_finder.change_points import DEFAULT_DETECTOR, DETECTORS
from schedule_finder.errors import InputError, OutOfReach
from schedule_finder.evaluation.evaluate import (
    BASELINE_SCORERS,
    Evaluation,
    Method,
    methods_for,
    smaller_images,
)
from schedule_finder.files import write_text
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.profiling.capture import ProfileRow
from schedule_finder.profiling.engines.base import Engine, Report, cut_chunks
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
    update_entries,
    write_entries,
)
from schedule_finder.search import AUTO, Search
from schedule_finder.solvers import DEFAULT_SOLVER
from schedule_finder.solvers.shapes import random_stages

FLUSH_SECONDS = 60
"""What a killed process can lose at most, where a chunk of samples takes longer."""
MOST_SKIPPED = 0.05
"""Share of samples that may be unusable before a run stops: beyond it the data set is the problem."""
LEAST_TRIED = 60
MOST_SAMPLES = 4096
"""Where the number of samples is `auto`."""
SWEEP = (0.5, 0.35, 0.25, 0.2, 0.15, 0.1)
"""Budgets of the accuracy curve, in the unit of the run's budget."""
PARETO = (0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8)
"""Budgets of the front."""
PUBLISHED_SHAPES = ("paper", "pyramid")
RANDOM_DRAWS = 3
SWEEP_BASELINES = ("last_token", "random", "strided")

Progress = Callable[[int, int], None]
"""Called with (done, total)."""
_Item = TypeVar("_Item")


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
    places = {entry.id: place for place, entry in enumerate(entries) if entry.use == "calibration"}
    pending = frozenset(
        name
        for name, place in places.items()
        if entries[place].status == "pending" or (entries[place].status == "done" and name not in stored)
    )
    chunks = cut_chunks([entries[place] for place in places.values()], pending)
    if after_shard is not None and after_shard(store):
        chunks = []
    with run.step("profile") as facts:
        changed: list[SampleEntry] = []
        rows: dict[str, ProfileRow] = {}

        def flush() -> None:
            # Notes before rows: a sample that is noted as done but not stored is done again.
            if changed:
                update_entries(run.samples, changed)
            store.append(list(rows), list(rows.values()))
            changed.clear()
            rows.clear()

        left = len(pending)
        skipped = [entry for entry in entries if entry.use == "calibration" and entry.status == "skipped"]
        _check_skipped(skipped, len(places) - left, len(places), max_skipped)
        progress(len(places) - left, len(places))
        flushed = time.monotonic()
        try:
            for result in engine.profile(chunks, report):
                for outcome in result.outcomes:
                    entry = entries[places[outcome.entry.id]] = outcome.entry
                    changed.append(entry)
                    if outcome.row is None:
                        skipped.append(entry)
                    elif entry.id not in stored:
                        rows[entry.id] = outcome.row
                left -= len(result.outcomes)
                progress(len(places) - left, len(places))
                if result.last or time.monotonic() - flushed > FLUSH_SECONDS:
                    flush()
                    flushed = time.monotonic()
                if result.last:
                    _check_skipped(skipped, len(places) - left, len(places), max_skipped)
                    if after_shard is not None and after_shard(store):
                        break
        finally:
            flush()
        write_entries(run.samples, entries)
        facts |= _counts(entries, "calibration")
    return _counts(entries, "calibration")


def detect_step(run: Run, detector: str | None = None) -> dict[str, Any]:
    """Step 3: change points by every detector; ``detector`` is the one the schedule will follow."""
    default = detector or DEFAULT_DETECTOR
    if default not in DETECTORS:
        raise InputError(f"--detector {default!r}: choose {', '.join(DETECTORS)}")
    profile = run.profile.read()
    layers = profile.layers
    with run.step("detect", detector=default):
        found = {}
        for name, make in DETECTORS.items():
            detection = make().detect(profile.maps, seed=run.options["seed"])
            found[name] = {
                "change_points": [layers[index] for index in detection.change_points],
                "evidence": detection.evidence,
            }
        document = {"default": default, "samples": len(profile), "layers": layers, "detectors": found}
        write_text(run.change_points, json.dumps(document, indent=2) + "\n")
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
    """Step 4: from the profile, its change points and what the solver measures to ``4_schedule.json``."""
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
    """The front over budgets: what each costs by every count, and its predicted and measured divergence.

    Writes ``4_pareto.csv`` and its figure. Budgets that no stages can meet are left out.
    """
    rows = []
    for budget in budgets:
        try:
            found = search.solve(budget, kind, solver=solver, scorer=scorer, dropped_tokens=dropped_tokens)
        except OutOfReach:
            continue
        assert found.budget is not None
        costs, reasons = found.budget.model_dump(), found.evidence["solver"]
        rows.append(
            {
                "budget_kind": kind,
                "budget": budget,
                **{name: costs[name] for name in ("processed", "published", "flops", "kv", "latency")},
                "predicted_kl": reasons.get("predicted_kl"),
                "measured_kl": reasons.get("measured_kl"),
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
    sweep: Sequence[float] = SWEEP,
    search: Search | None = None,
) -> pd.DataFrame:
    """Step 5: the schedule and its baselines against the full model, on samples discovery never saw.

    Args:
        run: the run, with a schedule.
        loaded: the backbone.
        data: what the samples are loaded from.
        progress: called with the samples done and all samples.
        batch_size: samples per forward pass.
        max_new_tokens: longest answer.
        sweep: further budgets, each with a schedule of its own from the same profile.
        search: what solves for them; None: one that measures on this backbone.
    """
    schedule = Schedule.load(run.schedule)
    schedule.check_backbone(loaded.backbone)
    entries = read_entries(run.samples)
    held_out = [i for i, entry in enumerate(entries) if entry.use == "held_out"]
    if not held_out:
        raise InputError(f"{run.samples}: no held-out samples; begin a run with --eval-samples above 0")
    search = search or Search(run, (loaded, data), batch_size=batch_size)
    methods = (
        methods_for(schedule) + _other_layers(schedule, search) + _sweep_methods(schedule, sweep, search)
    )
    evaluation = Evaluation(loaded, methods, max_new_tokens)
    with run.step("evaluate", max_new_tokens=max_new_tokens) as facts:
        progress(0, len(held_out))
        example_done = False
        for batch in _batches(held_out, batch_size):
            samples = []
            for place in batch:
                try:
                    sample = data.load(entries[place])
                except BadSample as error:
                    entries[place] = replace(entries[place], status="skipped", reason=str(error))
                    continue
                entries[place] = replace(describe(entries[place], sample), status="done")
                samples.append(sample)
            _stop_if_too_many_skipped(entries, "held_out")
            if samples:
                if not example_done:
                    evaluation.methods = [*methods, *smaller_images(loaded, schedule, samples)]
                evaluation.run_batch(samples)
                if not example_done:
                    _write_example(run, loaded, schedule, samples[0], max_new_tokens)
                    example_done = True
            progress(sum(entries[i].status != "pending" for i in held_out), len(held_out))
        table = evaluation.table()
        table.to_csv(run.evaluation, index=False, float_format="%.6g")
        write_entries(run.samples, entries)
        facts |= _counts(entries, "held_out")
    _note_held_out(run, schedule, table)
    return table


def _other_layers(schedule: Schedule, search: Search) -> list[Method]:
    """Controls with the schedule's budget and rule that prune elsewhere: published shapes, and random layers."""
    if schedule.budget is None:
        return []
    budget, kind = schedule.budget.target, schedule.budget.kind
    others = {}
    for name in PUBLISHED_SHAPES:
        with suppress(OutOfReach):  # they leave the first layer whole, which may cost more than the budget
            others[name] = search.solve(budget, kind, solver=name).stages
    target, earliest = search.target(budget, kind), search.profile.earliest_stage
    for draw in range(RANDOM_DRAWS):
        with suppress(OutOfReach):
            drawn = random_stages(target, np.random.default_rng(draw), earliest)
            others[f"random layers {draw}"] = drawn
    return [
        Method(name, schedule.model_copy(update={"stages": stages}), budget)
        for name, stages in others.items()
    ]


def _sweep_methods(schedule: Schedule, budgets: Sequence[float], search: Search) -> list[Any]:
    if not budgets or schedule.budget is None:
        return []
    solver = schedule.evidence.get("solver", {}).get("solver", DEFAULT_SOLVER)
    methods = []
    for budget in budgets:
        if abs(budget - schedule.budget.target) < 1e-9:
            continue
        try:
            other = search.solve(budget, schedule.budget.kind, solver=solver)
        except OutOfReach:
            continue  # a budget below what this backbone can reach is a gap in the curve, no failure
        methods += methods_for(other, [name for name in SWEEP_BASELINES if name in BASELINE_SCORERS])
    return methods


def _write_example(
    run: Run, loaded: LoadedBackbone, schedule: Schedule, sample: Sample, max_new_tokens: int
) -> None:
    """Keep one sample with what every stage leaves of it, for the overlay figure."""
    inputs = {name: value.to(loaded.device) for name, value in loaded.inputs([sample]).items()}
    vision = loaded.backbone.vision_mask(inputs["input_ids"])[0]
    side = round(int(vision.sum()) ** 0.5)
    square = len({size for image in sample.images for size in image.size}) == 1
    if len(sample.images) != 1 or not square or side * side != int(vision.sum()):
        return  # where a token lies is known for one square image only: others are cropped, padded or tiled
    first = int(vision.nonzero()[0])
    length = inputs["input_ids"].shape[1]
    full = loaded.generate(inputs, max_new_tokens)
    with pruned(loaded.backbone.model, schedule) as record:
        short = loaded.generate(inputs, max_new_tokens)
    document = {
        "id": sample.id,
        "question": sample.question,
        "answer": sample.answer,
        "full_answer": loaded.answers(full[:, length:])[0],
        "pruned_answer": loaded.answers(short[:, length:])[0],
        "grid": [side, side],
        "stages": [
            {"layer": stage.layer, "kept": [place - first for place in stage.kept_positions()[0]]}
            for stage in record.stages
        ],
        "regions": list(sample.regions),
    }
    write_text(run.folder / "5_example.json", json.dumps(document, indent=2) + "\n")
    sample.images[0].save(run.folder / "5_example.png")


def _note_held_out(run: Run, schedule: Schedule, table: pd.DataFrame) -> None:
    """Put the held-out result into the schedule file, beside the reasons it was made for."""
    overall = table[(table.question_type == "all") & table.method.isin(["full", "schedule"])]
    target = schedule.budget.target if schedule.budget else 1.0
    own = overall[(overall.method == "full") | (np.isclose(overall.budget, target))]
    result = {
        row.method: {
            "n": int(row.n),
            **{
                name: None if pd.isna(value) else round(float(value), 6)
                for name, value in (
                    ("exact_match", row.exact_match),
                    ("ci_low", row.ci_low),
                    ("ci_high", row.ci_high),
                    ("agreement", row.agreement),
                    ("kl", row.kl),
                )
            },
        }
        for row in own.itertuples()
    }
    schedule.model_copy(update={"evidence": {**schedule.evidence, "held_out": result}}).save(run.schedule)


def _entries(run: Run, data: DataSet, count: int, held_out: int, seed: int) -> list[SampleEntry]:
    """The run's list of samples, chosen now if it is not yet; written in one result, without notes beside it."""
    chosen = run.samples.exists()
    entries = read_entries(run.samples) if chosen else choose_samples(data, count, held_out, seed)
    write_entries(run.samples, entries)
    return entries


def _batches(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _stop_if_too_many_skipped(entries: Sequence[SampleEntry], use: str) -> None:
    mine = [entry for entry in entries if entry.use == use]
    tried = [entry for entry in mine if entry.status != "pending"]
    skipped = [entry for entry in tried if entry.status == "skipped"]
    _check_skipped(skipped, len(tried), len(mine), MOST_SKIPPED)


def _check_skipped(skipped: Sequence[SampleEntry], tried: int, total: int, most: float) -> None:
    """Stop where more than a share ``most`` of the samples tried so far cannot be used."""
    if (tried >= LEAST_TRIED or tried == total) and len(skipped) > most * tried:
        raise InputError(
            f"{len(skipped)} of {tried} samples cannot be used, more than {most:.0%}; the last: "
            f"{skipped[-1].id}: {skipped[-1].reason} (all reasons are in 1_samples.jsonl; --max-skipped allows more)"
        )


def _counts(entries: Sequence[SampleEntry], use: str) -> dict[str, int]:
    mine = [entry for entry in entries if entry.use == use]
    return {status: sum(entry.status == status for entry in mine) for status in ("done", "skipped")}
