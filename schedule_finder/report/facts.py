"""What the report says in words and tables: verdict, warnings, stages, methods, question types."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from schedule_finder.evaluation.metrics import metric_label
from schedule_finder.evaluation.remarks import slower_than_full
from schedule_finder.evidence import AnswerQuality, HeldOutSummary
from schedule_finder.figures.methods import method_label
from schedule_finder.figures.style import words
from schedule_finder.intervals import paired_interval
from schedule_finder.measuring.token_policy import CONTROLS
from schedule_finder.run.stale import find_stale

if TYPE_CHECKING:
    from schedule_finder.figures.run_data import RunData
    from schedule_finder.run.folder import Run

Level = Literal["good", "caution", "bad", "info"]
FEW_SAMPLES = 100
"""Held-out samples below which the report warns of wide intervals."""


@dataclass(frozen=True)
class Finding:
    """A statement and what it means for the reader."""

    level: Level
    text: str


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is shown, and what it is sorted by."""

    text: str
    value: float | str


@dataclass(frozen=True)
class Table:
    """A sortable table; ``note`` explains its columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


# ---- verdict


def verdict(data: RunData) -> list[Finding]:
    """What the evaluation shows about the selected schedule; the most important first."""
    schedule, table = data.schedule, data.evaluation
    if schedule is None:
        return [Finding("info", "No schedule yet: run `adaptinfer-profile schedule` on this run.")]
    if table is None:
        return [
            Finding(
                "info",
                "The selected schedule was not evaluated: run `adaptinfer-profile evaluate` on this run.",
            )
        ]
    budget = schedule.budget.target if schedule.budget else None
    own = table[table.method == "schedule"]
    if own.empty:
        return [Finding("info", "The evaluation has no row of the selected schedule; evaluate again.")]
    if budget is not None and len(near := own[(own.budget - budget).abs() < 1e-9]):
        own = near
    ours = own.iloc[0]
    findings = [_headline(data, ours)]
    if (slower := slower_than_full(table, ours)) is not None:
        findings.append(Finding("bad", slower))
    findings += _against_controls(table, ours)
    best = _best_baseline(data, table, ours)
    if best is not None:
        findings.append(best)
    return findings


def _headline(data: RunData, ours: Any) -> Finding:
    """Score of the schedule against the full model's, with the paired interval where answers are stored."""
    assert data.evaluation is not None
    full = data.evaluation[data.evaluation.method == "full"].iloc[0]
    tokens = f"{ours.processed:.0%} of the vision tokens"
    if ours.score != ours.score:
        text = f"With {tokens}, the pruned model gives the full model's answer in {ours.agreement:.1%} of the samples."
        return Finding("info", text)
    name = metric_label(ours.metric)
    text = f"With {tokens}, {name} is {ours.score:.1%}; the full model has {full.score:.1%}."
    interval = _loss(data)
    if interval is None:
        return Finding("info", text)
    low, high = interval
    shown = f" 95 % interval of the difference: {_points(low)} to {_points(high)} points."
    if high < 0:
        return Finding("bad" if high < -0.05 else "caution", f"{text}{shown} Pruning lowers the score.")
    if low > -0.02:
        return Finding("good", f"{text}{shown} A loss of 2 points or more is unlikely.")
    return Finding("caution", f"{text}{shown} The samples do not rule out a loss.")


def _loss(data: RunData) -> tuple[float, float] | None:
    """Interval of the schedule's score less the full model's, paired by sample; None without stored answers."""
    run = data.run
    summary = HeldOutSummary.load(run.evaluation_summary)
    part = summary and summary.of(data.digest or "")
    if part is None or not run.answers.exists():
        return None
    table = pd.read_parquet(run.answers)
    own = table[(table.schedule == part.name) & table.method.isin(["schedule", part.name])]
    own = own[(own.budget - part.budget).abs() < 1e-9].drop_duplicates("id").set_index("id").score
    full = table[table.method == "full"].drop_duplicates("id").set_index("id").score
    pairs = (own - full).dropna().to_numpy(dtype=float)
    return paired_interval(pairs) if len(pairs) else None


def _against_controls(table: pd.DataFrame, ours: Any) -> list[Finding]:
    """Whether the schedule beats rules that read nothing."""
    if ours.scorer in CONTROLS:
        return [Finding("caution", f"The search chose the {words(ours.scorer)} rule, which reads nothing.")]
    findings = []
    for row in _at_budget(table, ours):
        if row.method not in CONTROLS or row.difference != row.difference:
            continue
        name = f"{words(row.method)} tokens"
        low, high = _points(-row.difference_high), _points(-row.difference_low)
        shown = f"{_points(-row.difference)} points, 95 % interval {low} to {high}"
        if row.difference_high < 0:
            findings.append(Finding("good", f"Better than {name} ({shown})."))
        elif row.difference_low > 0:
            findings.append(Finding("bad", f"Worse than {name} ({shown})."))
        else:
            findings.append(Finding("caution", f"Not shown to be better than {name} ({shown})."))
    return findings


def _best_baseline(data: RunData, table: pd.DataFrame, ours: Any) -> Finding | None:
    """The best other method at the same budget, where it is better than the schedule."""
    others = [row for row in _at_budget(table, ours) if row.difference == row.difference]
    if not others:
        return None
    best = max(others, key=lambda row: row.difference)
    if best.difference <= 0:
        return Finding("good", f"No measured baseline has a higher score ({len(others)} baselines).")
    sure = "" if best.difference_low > 0 else "; the interval includes zero"
    name = method_label(best.method, data.schedule)
    text = f"The baseline {name} scores {100 * best.difference:.1f} points more{sure}."
    return Finding("bad" if not sure else "caution", text)


def _at_budget(table: pd.DataFrame, ours: Any) -> list[Any]:
    """Baselines at the schedule's budget."""
    if "difference" not in table:
        return []
    near = table[(table.budget - ours.budget).abs() < 1e-9]
    return [row for row in near.itertuples() if row.method not in ("schedule", "full")]


# ---- warnings


def warnings(run: Run, data: RunData) -> list[str]:
    """What a reader must know before the numbers are used."""
    lines = [str(stale) for stale in find_stale(run)]
    summary = HeldOutSummary.load(run.evaluation_summary)
    quality = (summary.full_model if summary else None) or AnswerQuality.load(run.first_answers)
    if quality is not None:
        lines += quality.lines()
    table = data.evaluation
    if table is not None and (most := int(table.n.max())) < FEW_SAMPLES:
        lines.append(f"only {most} held-out samples: intervals are wide; evaluate on more before you deploy")
    steps = run.document()["steps"]
    for name in ("profile", "evaluate"):
        if skipped := steps.get(name, {}).get("skipped"):
            lines.append(f"{skipped} samples were skipped by `{name}`; reasons are in {run.samples.name}")
    return lines


# ---- tables


def stages_table(data: RunData) -> Table | None:
    """The stages of the selected schedule."""
    schedule = data.schedule
    if schedule is None:
        return None
    whole = data.mean_vision
    rows = []
    for stage in schedule.stages:
        where = "before the decoder" if stage.layer < 0 else f"after layer {stage.layer}"
        tokens = f"{stage.keep_ratio * whole:.0f}" if whole else "-"
        scorer = (stage.scorer or schedule.scorer).name
        rows.append(
            (
                Cell(where, stage.layer),
                Cell(f"{stage.keep_ratio:.1%}", stage.keep_ratio),
                Cell(tokens, stage.keep_ratio),
                Cell(scorer, scorer),
            )
        )
    note = f"Dropped tokens: {schedule.dropped_tokens}. Positions: {schedule.positions}."
    return Table("Stages", ("Stage", "Kept", "Tokens", "Scorer"), tuple(rows), note)


def methods_table(data: RunData) -> Table | None:
    """Every method of the evaluation at every budget."""
    table = data.evaluation
    if table is None:
        return None
    full = table[table.method == "full"].iloc[0]
    has_score = not table.exact_match.isna().all()
    measure = metric_label(full.metric) if has_score and "metric" in table else "exact match"
    head = (measure[0].upper() + measure[1:] + " (%)") if has_score else "Agreement (%)"
    columns = ("Method", "Budget (%)", head, "95 % interval", "Same answer (%)", "Answer KL", "Processed (%)",
               "FLOPs (%)", "Cache (%)", "Prefill time (%)")  # fmt: skip
    rows = []
    for row in table.itertuples():
        value, low, high = _scored(row, has_score)
        ratios = [
            _ratio(getattr(row, name, math.nan), getattr(full, name, math.nan))
            for name in ("flops", "kv_bytes", "prefill_ms")
        ]
        rows.append(
            (
                Cell(method_label(row.method, data.schedule), str(row.method)),
                _percent(row.budget),
                _percent(value),
                Cell(f"{100 * low:.1f} to {100 * high:.1f}" if low == low else "-", _or_low(low)),
                _percent(row.agreement),
                Cell(f"{row.kl:.3f}" if row.kl == row.kl else "-", _or_low(row.kl)),
                _percent(row.processed),
                *(_percent(ratio, 0) for ratio in ratios),
            )
        )
    note = (
        "Same answer: as the full model. Answer KL: of the first answer token, in nats. FLOPs, cache and time are "
        "those of the decoder's prefill relative to the full model."
    )
    return Table("Methods", columns, tuple(rows), note)


def question_types_table(run: Run, data: RunData) -> Table | None:
    """Score by question type, of the full model and of the schedule."""
    if data.evaluation is None:
        return None
    table = pd.read_csv(run.evaluation)
    kinds = [kind for kind in table.question_type.unique() if kind != "all"]
    summary = HeldOutSummary.load(run.evaluation_summary)
    part = summary and summary.of(data.digest or "")
    if part is None or len(kinds) < 2:
        return None
    own = table[(table.schedule == part.name) & table.method.isin(["schedule", part.name])]
    own = own[(own.budget - part.budget).abs() < 1e-9].set_index("question_type")
    full = table[table.method == "full"].set_index("question_type")
    rows = []
    for kind in kinds:
        if kind not in own.index or kind not in full.index:
            continue
        before, after = full.loc[kind], own.loc[kind]
        rows.append(
            (
                Cell(words(str(kind)), str(kind)),
                Cell(str(int(after.n)), int(after.n)),
                _percent(before.score),
                _percent(after.score),
                Cell(_points(after.score - before.score), _or_low(after.score - before.score)),
            )
        )
    columns = ("Question type", "Samples", "Full model (%)", "Schedule (%)", "Difference (points)")
    return Table("Question types", columns, tuple(rows))


def schedules_table(run: Run) -> Table | None:
    """Every schedule that the run keeps."""
    names = run.schedules.names()
    if not names:
        return None
    selected = run.schedules.selected()
    rows = []
    for name in names:
        found = run.schedules.find(name).schedule
        stages = ", ".join(f"{stage.layer}: {stage.keep_ratio:.1%}" for stage in found.stages)
        cost = found.budget.processed if found.budget else math.nan
        label = f"{name} (selected)" if selected is not None and selected.name == name else name
        rows.append(
            (
                Cell(label, name),
                Cell(f"{100 * cost:.1f}" if cost == cost else "-", _or_low(cost)),
                Cell(found.scorer.name, found.scorer.name),
                Cell(stages or "none", stages),
            )
        )
    return Table("Schedules of this run", ("Name", "Processed (%)", "Scorer", "Layer: kept"), tuple(rows))


def _scored(row: Any, has_score: bool) -> tuple[float, float, float]:
    if not has_score:
        return row.agreement, math.nan, math.nan
    if "score" in row._fields:
        return row.score, row.score_low, row.score_high
    return row.exact_match, row.ci_low, row.ci_high


def _points(share: float) -> str:
    """A difference in points with its sign; zero has none."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def _percent(share: float, digits: int = 1) -> Cell:
    return Cell(f"{100 * share:.{digits}f}" if share == share else "-", _or_low(share))


def _ratio(value: float, whole: float) -> float:
    return value / whole if whole else math.nan


def _or_low(value: float) -> float:
    """A number to sort by; missing ones come first."""
    return float(value) if value == value and np.isfinite(value) else -1e9
