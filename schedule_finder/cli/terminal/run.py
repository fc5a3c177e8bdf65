"""Runs and backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape

from schedule_finder.cli.terminal import make_table, show_table
from schedule_finder.cli.terminal.schedule import show_schedule

if TYPE_CHECKING:
    from schedule_finder.run.folder import Run


def show_run(current: Run) -> None:
    """The steps of a run, and its schedule if it has one."""
    from pruning_runtime.schedule import Schedule
    from schedule_finder.evidence import HeldOutSummary

    table = make_table(f"Run {current.folder}", "step", "state", "seconds", "facts")
    for name, entry in current.document()["steps"].items():
        facts = ", ".join(f"{key} {value}" for key, value in entry.items() if key not in ("state", "seconds"))
        table.add_row(name, entry["state"], str(entry.get("seconds", "")), facts)
    show_table(table)
    if current.schedule.exists():
        show_schedule(Schedule.load(current.schedule), HeldOutSummary.load(current.evaluation_summary))


def show_backbone(name: str, facts: dict[str, Any]) -> None:
    """Facts about a backbone."""
    table = make_table(f"Backbone {name}", "fact", "value")
    for key, value in facts.items():
        table.add_row(key, escape(str(value)))
    show_table(table)
