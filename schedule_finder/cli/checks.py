"""Checks of a whole run before its first long step. Every function raises `InputError`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schedule_finder.cli.parsing import fraction
from schedule_finder.errors import BadSample, InputError, OutOfReach

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pruning_runtime.schedule import BudgetKind
    from schedule_finder.profiling.engines.base import Engine
    from schedule_finder.samples import DataSet, SampleEntry

_PROMPTS = 8
"""Calibration samples whose tokens are counted for budgets that depend on them."""


def check_held_out(data: DataSet, entries: Sequence[SampleEntry], max_skipped: float) -> None:
    """Load every held-out sample that is not known yet; refuse where the evaluation would."""
    held_out = [entry for entry in entries if entry.use == "held_out"]
    reasons = []
    for entry in held_out:
        if entry.status != "pending":
            continue
        try:
            data.load(entry)
        except BadSample as error:
            reasons.append(f"{entry.id}: {error}")
    if len(reasons) > max_skipped * len(held_out):
        raise InputError(
            f"{len(reasons)} of {len(held_out)} held-out samples cannot be used, more than {max_skipped:.0%}; the "
            f"last: {reasons[-1]} (mend the data set; or --max-skipped allows more, and --eval-samples 0 is a run without "
            "evaluation)"
        )


def check_reachable(
    engine: Engine, prompts: Sequence[tuple[int, int]], budget: str, kind: BudgetKind, solver: str
) -> None:
    """Refuse a budget that no stages can meet on this backbone.

    Args:
        engine: with its backbone.
        prompts: ``(vision tokens, other tokens)`` of some samples; a budget that one of them can meet passes.
        budget: as typed. Latency is measured later, so it is not checked here.
        kind: of the budget.
        solver: which may or may not have a stage before the decoder.
    """
    from pruning_runtime.geometry import DecoderShape
    from schedule_finder.solvers import SOLVERS, BudgetTarget

    if kind == "latency":
        return
    layers = engine.meta["layers"]
    earliest = -1 if SOLVERS[solver].before_decoder and 0 in layers else 0
    if kind in ("processed", "published"):
        prompts = [(1, 0)]  # these do not depend on the tokens
    problem = None
    for vision, other in prompts:
        target = BudgetTarget(
            kind,
            fraction("--budget", budget),
            DecoderShape(**engine.meta["shape"]),
            vision,
            other,
            scoring_layers=layers,
        )
        try:
            target.deepest_layer(earliest)
        except OutOfReach as error:
            problem = error
        else:
            return
    if problem is not None:
        raise problem


def count_tokens(engine: Engine, data: DataSet, entries: Sequence[SampleEntry]) -> list[tuple[int, int]]:
    """``(vision tokens, other tokens)`` of the first few usable samples; none where workers hold the backbone."""
    loaded: Any = engine.loaded
    counts: list[tuple[int, int]] = []
    for entry in entries if loaded is not None else ():
        if len(counts) == _PROMPTS:
            break
        try:
            ids = loaded.inputs([data.load(entry)])["input_ids"]
        except InputError:
            raise
        except Exception:  # of any type, from processors; profiling skips the sample and records why
            continue
        vision = int(loaded.backbone.vision_mask(ids).sum())
        counts.append((vision, ids.numel() - vision))
    return counts
