"""Held-out samples in batches, and what baselines are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pruning_runtime.schedule import Schedule
from schedule_finder.errors import InputError
from schedule_finder.evaluation.methods import OWN, Comparison, Method, baseline_names, methods_to_compare
from schedule_finder.evaluation.remarks import left_out
from schedule_finder.evidence import Asked, Evidence
from schedule_finder.run.folder import Run
from schedule_finder.run.schedules import NamedSchedule
from schedule_finder.samples import BadSample, DataSet, Sample, SampleEntry, describe
from schedule_finder.samples.skipping import MOST_SKIPPED, check_skipped
from schedule_finder.search import AUTO, Search
from schedule_finder.solvers import DEFAULT_SOLVER

if TYPE_CHECKING:
    from schedule_finder.models.loading import LoadedBackbone


def held_out_batches(
    run: Run,
    data: DataSet,
    entries: list[SampleEntry],
    batch_size: int,
    most: int | None = None,
    max_skipped: float = MOST_SKIPPED,
) -> Iterator[list[Sample]]:
    """Held-out samples in batches, at most ``most`` of them; notes in ``entries`` how loading went.

    Raises `InputError` where there are none, fewer than ``most``, or more than ``max_skipped`` that cannot be used.
    """
    held_out = [index for index, entry in enumerate(entries) if entry.use == "held_out"]
    if not held_out:
        raise InputError(f"{run.samples}: no held-out samples; begin a run with --eval-samples above 0")
    if most is not None and most > len(held_out):
        raise InputError(
            f"--eval-samples {most}: the run holds out {len(held_out)} samples; ask for fewer, or begin a run with "
            f"--eval-samples {most}"
        )
    held_out = held_out[:most]
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
        check_skipped(skipped, first + len(indices), len(held_out), max_skipped)
        if samples:
            yield samples


def methods_for(
    loaded: LoadedBackbone,
    samples: Sequence[Sample],
    search: Search,
    chosen: Sequence[NamedSchedule],
    baselines: str | None,
    sweep: Sequence[float],
    own_names: bool,
    report: Callable[[str], None],
) -> list[Method]:
    """The schedules and the baselines of each; ``report`` gets a line about baselines that do not apply."""
    found: list[Method] = []
    for one in chosen:
        comparison = comparison_for(loaded, one, samples, search, own_name=own_names)
        names = baseline_names(baselines, one.schedule)
        methods = methods_to_compare(comparison, names, sweep)
        if missing := left_out(names, methods):
            report(
                f"left out, as schedule, backbone or data do not allow it: {', '.join(missing)} (baselines of {one.name})"
            )
        found += methods
    return found


def comparison_for(
    loaded: LoadedBackbone,
    named: NamedSchedule,
    samples: Sequence[Sample],
    search: Search,
    *,
    own_name: bool,
) -> Comparison:
    """What baselines are made from; other schedules are searched with what the user asked for."""
    schedule = named.schedule
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
        method=named.name if own_name else OWN,
        of=(named.name, named.digest),
    )
