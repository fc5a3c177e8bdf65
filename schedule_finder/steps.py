"""The numbered steps of a run. Each reads the files before it and writes its own, and re-runs alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from pruning_runtime import Schedule, pruned
from pruning_runtime.backbone import DecoderShape
from pruning_runtime.schedule import BackboneIdentity, BudgetKind, ScorerChoice
from schedule_finder.attention_profile import ProfileError, ProfileRow, profile_batch
from schedule_finder.backbones import LoadedBackbone
from schedule_finder.change_points import DEFAULT_DETECTOR, DETECTORS
from schedule_finder.errors import InputError
from schedule_finder.evaluate import CONTROLS, Evaluation, methods_for
from schedule_finder.files import write_text
from schedule_finder.profile_store import Profile
from schedule_finder.provenance import provenance
from schedule_finder.run_folder import Run
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
from schedule_finder.solvers import DEFAULT_SOLVER, SOLVERS, BudgetTarget

ROWS_PER_SHARD = 128
MOST_SKIPPED = 0.05
"""Share of samples that may be unusable before a run stops: beyond it the data set is the problem."""
LEAST_TRIED = 60
SWEEP = (0.5, 0.35, 0.25, 0.2, 0.15)
"""Budgets of the accuracy curve, in the unit of the run's budget."""
SWEEP_CONTROLS = ("last_token", "random", "strided")

Progress = Callable[[int, int], None]
"""Called with (done, total)."""
_Item = TypeVar("_Item")


def profile_step(
    run: Run, loaded: LoadedBackbone, data: DataSet, progress: Progress, *, batch_size: int
) -> dict[str, Any]:
    """Steps 1 and 2: choose samples, run them through the backbone, store their profiles.

    Samples that are already stored are not done again. Returns counts by status.
    """
    options = run.options
    entries = _entries(run, data, options["samples"], options["eval_samples"], options["seed"])
    store = run.profile
    store.open(
        {
            "backbone": loaded.identity.model_dump(),
            "shape": {name: getattr(loaded.backbone.shape, name) for name in DecoderShape.__slots__},
            "layers": list(range(loaded.backbone.shape.num_layers)),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "prompt_digest": loaded.prompt_digest,
        }
    )
    stored = set(store.ids())
    pending = [
        i
        for i, e in enumerate(entries)
        if e.use == "discovery" and e.id not in stored and e.status != "skipped"
    ]
    with run.step("profile") as facts:
        rows: list[tuple[str, ProfileRow]] = []

        def flush() -> None:
            store.append([name for name, _ in rows], [row for _, row in rows])
            rows.clear()
            write_entries(run.samples, entries)

        total = sum(entry.use == "discovery" for entry in entries)
        progress(total - len(pending), total)
        try:
            for batch in _batches(pending, batch_size):
                for place, sample, result in _profile_some(loaded, data, [(i, entries[i]) for i in batch]):
                    if sample is not None and isinstance(result, ProfileRow):
                        entries[place] = replace(describe(entries[place], sample), status="done")
                        rows.append((entries[place].id, result))
                    else:
                        entries[place] = replace(entries[place], status="skipped", reason=str(result))
                _stop_if_too_many_skipped(entries, "discovery")
                if len(rows) >= ROWS_PER_SHARD:
                    flush()
                progress(total - len(pending) + sum(entries[i].status != "pending" for i in pending), total)
        finally:
            flush()
        facts |= _counts(entries, "discovery")
    return _counts(entries, "discovery")


def detect_step(run: Run, detector: str | None = None) -> dict[str, Any]:
    """Step 3: change points by every detector; ``detector`` is the one the schedule will follow."""
    default = detector or DEFAULT_DETECTOR
    if default not in DETECTORS:
        raise InputError(f"--detector {default!r}: choose {', '.join(DETECTORS)}")
    profile = run.profile.read()
    layers = profile.meta["layers"]
    with run.step("detect", detector=default):
        found = {}
        for name, make in DETECTORS.items():
            detection = make().detect(profile.maps, seed=run.options["seed"])
            found[name] = {
                "change_points": [layers[place] for place in detection.change_points],
                "evidence": detection.evidence,
            }
        document = {"default": default, "samples": len(profile), "layers": layers, "detectors": found}
        write_text(run.change_points, json.dumps(document, indent=2) + "\n")
    return document


def schedule_step(
    run: Run,
    *,
    budget: float,
    kind: BudgetKind = "processed",
    solver: str = DEFAULT_SOLVER,
    scorer: str = "text_guided",
) -> Schedule:
    """Step 4: from the profile and its change points to ``4_schedule.json``; no model is loaded."""
    profile = run.profile.read()
    detections = _detections(run)
    with run.step("schedule", budget=budget, budget_kind=kind, solver=solver, scorer=scorer):
        schedule = solve(run, profile, detections, budget=budget, kind=kind, solver=solver, scorer=scorer)
        schedule.save(run.schedule)
    return schedule


def solve(
    run: Run,
    profile: Profile,
    detections: dict[str, Any],
    *,
    budget: float,
    kind: BudgetKind,
    solver: str = DEFAULT_SOLVER,
    scorer: str = "text_guided",
) -> Schedule:
    """A schedule for one budget with its evidence, not written anywhere. Raises `InputError`."""
    if solver not in SOLVERS:
        raise InputError(f"--solver {solver!r}: choose {', '.join(SOLVERS)}")
    if scorer not in profile.scores:
        raise InputError(f"--scorer {scorer!r}: the profile holds {', '.join(profile.scores)}")
    if not 0 < budget <= 1:
        raise InputError(
            f"--budget {budget}: a fraction of the unpruned cost, above 0 and at most 1 (or 15%)"
        )
    target = BudgetTarget(
        kind, budget, DecoderShape(**profile.meta["shape"]), profile.mean_vision, profile.mean_other
    )
    detection = detections["detectors"][detections["default"]]
    solution = SOLVERS[solver]().solve(profile, detection["change_points"], target, scorer=scorer)
    entries = {entry.id: entry for entry in read_entries(run.samples)}
    return Schedule(
        backbone=BackboneIdentity(**profile.meta["backbone"]),
        stages=tuple(
            stage.model_copy(update={"keep_tokens": stage.kept(round(profile.mean_vision))})
            for stage in solution.stages
        ),
        scorer=ScorerChoice(name=scorer),
        budget=target.account(solution.stages),
        evidence={
            "samples": len(profile),
            "dataset": run.options["dataset"],
            "typical_prompt": {
                "vision_tokens": round(profile.mean_vision, 1),
                "other_tokens": round(profile.mean_other, 1),
            },
            "question_types": sorted(
                {entries[name].question_type for name in profile.ids if name in entries}
            ),
            "detector": {"name": detections["default"]},
            "change_points": detection["change_points"],
            "solver": solution.evidence,
        },
        provenance=provenance(
            revision=profile.meta["backbone"].get("revision"),
            profile_dtype=profile.meta["dtype"],
            prompt_digest=profile.meta["prompt_digest"],
            seed=run.options["seed"],
        ),
    )


def evaluate_step(
    run: Run,
    loaded: LoadedBackbone,
    data: DataSet,
    progress: Progress,
    *,
    batch_size: int,
    max_new_tokens: int = 16,
    sweep: Sequence[float] = SWEEP,
) -> pd.DataFrame:
    """Step 5: the schedule and its controls against the full model, on samples discovery never saw.

    ``sweep``: further budgets, each with a schedule of its own from the same profile.
    """
    schedule = Schedule.load(run.schedule)
    schedule.check_backbone(loaded.backbone)
    entries = read_entries(run.samples)
    held_out = [i for i, entry in enumerate(entries) if entry.use == "held_out"]
    if not held_out:
        raise InputError(f"{run.samples}: no held-out samples; begin a run with --eval-samples above 0")
    methods = methods_for(schedule) + _sweep_methods(run, schedule, sweep)
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


def _sweep_methods(run: Run, schedule: Schedule, budgets: Sequence[float]) -> list[Any]:
    if not budgets or schedule.budget is None:
        return []
    profile, detections = run.profile.read(), _detections(run)
    methods = []
    for budget in budgets:
        if abs(budget - schedule.budget.target) < 1e-9:
            continue
        try:
            other = solve(
                run,
                profile,
                detections,
                budget=budget,
                kind=schedule.budget.kind,
                scorer=schedule.scorer.name,
            )
        except InputError:
            continue  # a budget below what this backbone can reach is a gap in the curve, no failure
        methods += methods_for(other, [name for name in SWEEP_CONTROLS if name in CONTROLS])
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
    if run.samples.exists():
        return read_entries(run.samples)
    entries = choose_samples(data, count, held_out, seed)
    write_entries(run.samples, entries)
    return entries


def _detections(run: Run) -> dict[str, Any]:
    try:
        return json.loads(run.change_points.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{run.change_points}: not there; run `adaptinfer-profile detect {run.folder}` first"
        ) from None
    except ValueError as error:
        raise InputError(f"{run.change_points}: not readable ({error}); detect again") from error


def _batches(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _profile_some(
    loaded: LoadedBackbone, data: DataSet, entries: Sequence[tuple[int, SampleEntry]]
) -> list[tuple[int, Sample | None, ProfileRow | str]]:
    """Profile one batch; a sample that cannot be used comes back as the reason why."""
    results: list[tuple[int, Sample | None, ProfileRow | str]] = []
    usable: list[tuple[int, Sample]] = []
    for place, entry in entries:
        try:
            usable.append((place, data.load(entry)))
        except BadSample as error:
            results.append((place, None, str(error)))
    try:
        rows = (
            profile_batch(loaded.backbone, loaded.inputs([sample for _, sample in usable])) if usable else []
        )
    except (ProfileError, ValueError) as error:
        if len(usable) == 1:
            return [*results, (usable[0][0], usable[0][1], str(error))]
        # One sample spoilt the batch: find it by doing them one by one.
        by_place = dict(entries)
        for place, _ in usable:
            results += _profile_some(loaded, data, [(place, by_place[place])])
        return results
    for (place, sample), row in zip(usable, rows, strict=True):
        finite = all(np.isfinite(values).all() for values in (*row.scores.values(), *row.curves.values()))
        results.append(
            (place, sample, row if finite else "the model's attention is not finite (NaN or infinite)")
        )
    return results


def _stop_if_too_many_skipped(entries: Sequence[SampleEntry], use: str) -> None:
    tried = [entry for entry in entries if entry.use == use and entry.status != "pending"]
    skipped = [entry for entry in tried if entry.status == "skipped"]
    everything = len(tried) == sum(entry.use == use for entry in entries)
    if (len(tried) >= LEAST_TRIED or everything) and len(skipped) > MOST_SKIPPED * len(tried):
        raise InputError(
            f"{len(skipped)} of {len(tried)} samples cannot be used, more than {MOST_SKIPPED:.0%}; the last: "
            f"{skipped[-1].id}: {skipped[-1].reason} (all reasons are in 1_samples.jsonl)"
        )


def _counts(entries: Sequence[SampleEntry], use: str) -> dict[str, int]:
    mine = [entry for entry in entries if entry.use == use]
    return {status: sum(entry.status == status for entry in mine) for status in ("done", "skipped")}
