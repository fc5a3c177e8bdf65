"""The work ahead of a run."""

from __future__ import annotations

from typing import Any

from schedule_finder.cli.terminal import make_table, screen, show_table


def show_plan(plan: dict[str, Any]) -> None:
    """Samples, forward passes, answers, time and memory."""
    samples, tokens, seconds = plan["samples"], plan["tokens_per_sample"], plan["seconds"]
    table = make_table("Work ahead; nothing was written", "step", "work", "time")
    table.add_row(
        "profile",
        f"{samples['profile']} of {samples['calibration']} samples, a forward pass each",
        _time(seconds["profile"]),
    )
    search = plan["forwards"]["search"]
    counted = (
        "not known before the search" if search is None else f"at most {search} forward passes of one sample"
    )
    if plan["search_answers"]:
        counted += f", {plan['search_answers']} answers"
    table.add_row("search", counted, _time(seconds["search"]))
    table.add_row(
        "evaluate",
        f"{plan['methods']} methods x {samples['held_out']} held-out samples = {plan['generations']} answers",
        _time(seconds["evaluate"]),
    )
    known = [value for value in seconds.values() if value is not None]
    table.add_row("all", "" if len(known) == len(seconds) else "without the search", _time(sum(known)))
    show_table(table)
    counts = ", ".join(f"{one['mean']} {name} ({one['min']}-{one['max']})" for name, one in tokens.items())
    memory, timed = plan["memory"], plan["timed"]
    screen.print(f"tokens per sample: {counts}")
    screen.print(
        f"memory: weights {memory['weights_bytes'] / 1e9:.2f} GB, peak {memory['peak_bytes'] / 1e9:.2f} GB "
        f"({memory['peak_of']})"
    )
    screen.print(f"estimated from {timed['batches']} timed batch(es), {timed['samples']} samples")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
