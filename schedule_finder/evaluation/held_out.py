"""Held-out samples in batches, and what baselines are made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pruning_runtime.schedule import Schedule
from schedule_finder.errors import InputError
from schedule_finder.evaluation.methods import OWN, Comparison
from schedule_finder.evidence import Asked, Evidence
from schedule_finder.run.folder import Run
from schedule_finder.run.schedules import NamedSchedule
from schedule_finder.samples import BadSample, DataSet, Sample, SampleEntry, describe
from schedule_finder.samples.skipping import check_skipped
from schedule_finder.search import AUTO, Search
from schedule_finder.solvers import DEFAULT_SOLVER

if TYPE_CHECKING:
    from schedule_finder.models.loading import LoadedBackbone


def held_out_batches(
    run: Run, data: DataSet, entries: list[SampleEntry], batch_size: int, most: int | None = None
) -> Iterator[list[Sample]]:
    """Held-out samples in batches, at most ``most`` of them; notes in ``entries`` how loading went.

    Raises `InputError` where there are none, fewer than ``most``, or too many that cannot be used.
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
        check_skipped(skipped, first + len(indices), len(held_out))
        if samples:
            yield samples


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
