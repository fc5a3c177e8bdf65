"""Merging of the profiles of separate jobs into one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from schedule_finder.errors import InputError
from schedule_finder.run.folder import Run
from schedule_finder.samples import SampleEntry, read_entries, write_entries


def merge_runs(runs: Sequence[Run], out: Run, command: str) -> dict[str, int]:
    """Join the profiles and the lists of samples of ``runs`` in the folder of ``out``.

    A sample of several runs is taken from the first of them. The first run's held-out samples stay held
    out, except those that another run profiled. An interrupted merge is completed.

    Returns:
        Counts of the joined run's calibration samples by status.

    Raises:
        InputError: a run's data set is another one, or ``out`` is a run already.
        StoreError: a profile is of another backbone, prompt or dtype, or damaged.
    """
    if out.path.exists():
        raise InputError(f"{out.folder} holds a run; choose another --out")
    first, *others = [run.options for run in runs]
    for run, options in zip(runs[1:], others, strict=True):
        if different := [name for name in ("dataset", "columns") if options[name] != first[name]]:
            raise InputError(
                f"{run.folder} has another {' and '.join(different)} than {runs[0].folder}; only profiles of one data "
                "set are merged (for several, give --dataset several times)"
            )
    entries = _merged_entries([read_entries(run.samples) for run in runs])
    out.profile.merge([run.profile for run in runs])
    stored = set(out.profile.ids())
    # A run that was killed may have noted a sample whose row was not yet stored.
    entries = [
        replace(entry, status="pending") if _is_done(entry) and entry.id not in stored else entry
        for entry in entries
    ]
    write_entries(out.samples, entries)
    used = [entry for entry in entries if entry.use == "calibration"]
    counts = {
        "done": len(stored),
        "skipped": sum(entry.status == "skipped" for entry in used),
        "pending": sum(entry.status == "pending" for entry in used),
    }
    # Last: only a finished merge is a run.
    sizes = {"samples": len(used), "eval_samples": len(entries) - len(used)}
    Run.begin(out.folder, command, {**first, **sizes})
    with out.step("profile", merged=[str(run.folder) for run in runs]) as facts:
        facts |= counts
    return counts


def _is_done(entry: SampleEntry) -> bool:
    return entry.use == "calibration" and entry.status == "done"


def _merged_entries(lists: Sequence[Sequence[SampleEntry]]) -> list[SampleEntry]:
    merged: dict[str, SampleEntry] = {}
    for entries in lists:
        for entry in entries:
            known = merged.get(entry.id)
            if entry.use == "calibration" and (known is None or not _is_done(known)):
                merged[entry.id] = entry
    for entry in lists[0]:
        if entry.use == "held_out":
            merged.setdefault(entry.id, entry)
    return list(merged.values())
