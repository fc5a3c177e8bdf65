"""The model card of a repository of schedules, in Markdown with the hub's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pruning_runtime.display import percent, stage_name

if TYPE_CHECKING:
    from pruning_runtime.schedule import Schedule


@dataclass(frozen=True)
class Entry:
    """A schedule of a repository; ``results``: method -> held-out numbers, as in ``5_evaluation.json``."""

    name: str
    schedule: Schedule
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def model_card(repo_id: str, entries: Sequence[Entry], figure: str | None) -> str:
    """The card. ``figure``: file of the evidence figure, None without one."""
    entries = sorted(entries, key=lambda entry: (_target(entry.schedule), entry.name))
    bases = list(dict.fromkeys(entry.schedule.backbone.name for entry in entries))
    parts = [
        _metadata(bases),
        f"# Pruning schedules for {', '.join(bases)}",
        "Schedules of adaptinfer: the decoder layers at which vision tokens leave, "
        "how many are kept, and the rule that chooses them. They are applied to the stock checkpoint; no weights are here.",
        _costs(entries),
        _results(entries),
    ]
    if figure is not None:
        parts.append(f"![Evidence for the schedule]({figure})")
    parts.append(_usage(repo_id, entries))
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(bases: Sequence[str]) -> str:
    lines = ["---", "library_name: adaptinfer", "tags:", "- adaptinfer", "- vision-token-pruning"]
    named = [name for name in bases if name.count("/") == 1 and not name.startswith(("/", "."))]
    if named:
        lines += ["base_model:", *(f"- {json.dumps(name)}" for name in named)]
    return "\n".join([*lines, "---"])


def _costs(entries: Sequence[Entry]) -> str:
    """A table of stages with both token counts: what layers compute, and the count of the papers."""
    rows = []
    for entry in entries:
        schedule, budget = entry.schedule, entry.schedule.budget
        stages = "; ".join(
            f"{stage_name(stage.layer)}: {percent(stage.keep_ratio)}" for stage in schedule.stages
        )
        scorers = ", ".join(
            dict.fromkeys((stage.scorer or schedule.scorer).name for stage in schedule.stages)
        )
        costs = ("-", "-") if budget is None else (percent(budget.processed), percent(budget.published))
        rows.append((f"`{entry.name}`", stages or "none", scorers, schedule.dropped_tokens, *costs))
    head = ("Name", "Stages and kept tokens", "Scorer", "Dropped tokens", "Processed", "Published count")
    note = "Processed: vision tokens that the layers compute, mean over layers. Published count: as papers count them."
    return f"## Schedules\n\n{_table(head, rows)}\n\n{note}"


def _results(entries: Sequence[Entry]) -> str:
    """Held-out numbers; empty where no schedule has any."""
    rows = [
        (
            f"`{entry.name}`",
            method,
            one.get("n", "-"),
            _share(one, "score"),
            _interval(one),
            _number(one, "kl"),
        )
        for entry in entries
        for method, one in entry.results.items()
    ]
    if not rows:
        return ""
    head = ("Schedule", "Method", "Samples", "Score", "95 % interval", "Answer KL (nats)")
    return f"## Held-out results\n\n{_table(head, rows)}"


def _usage(repo_id: str, entries: Sequence[Entry]) -> str:
    budgets = [entry.schedule.budget for entry in entries if entry.schedule.budget is not None]
    chosen = f", budget={budgets[0].target:g}" if budgets else ""
    return (
        "## Use\n\n```python\nfrom pruning_runtime import Schedule, pruned\n\n"
        f'schedule = Schedule.from_pretrained("{repo_id}"{chosen})\n'
        "with pruned(model, schedule) as record:\n    model.generate(**inputs, max_new_tokens=32)\n```"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _target(schedule: Schedule) -> float:
    return schedule.budget.target if schedule.budget is not None else 2.0


def _share(one: Mapping[str, Any], name: str) -> str:
    value = one.get(name)
    return "-" if value is None else percent(value)


def _interval(one: Mapping[str, Any]) -> str:
    low, high = one.get("score_low"), one.get("score_high")
    return "-" if low is None or high is None else f"{percent(low)} to {percent(high)}"


def _number(one: Mapping[str, Any], name: str) -> str:
    value = one.get(name)
    return "-" if value is None else f"{value:.3g}"
