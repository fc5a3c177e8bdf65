"""Change points, schedules and the front over budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from rich.markup import escape

from schedule_finder.cli.terminal import make_table, screen, show_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

    from pruning_runtime.schedule import Schedule
    from schedule_finder.run.folder import Run

MOST_ROWS = 4
"""Up to so many stages have a row each."""


def show_detections(document: dict[str, Any]) -> None:
    """Change points by every detector."""
    table = make_table("Change points", "detector", "first layer of each new regime")
    for name, entry in document["detectors"].items():
        points = ", ".join(map(str, entry["change_points"])) or "none"
        table.add_row(name + (" (used)" if name == document["default"] else ""), points)
    show_table(table)


def show_schedule(schedule: Schedule) -> None:
    """Stages, their cost in every unit, the solver's reasons and the held-out results, on one screen."""
    from pruning_runtime.schedule import BudgetKind

    _show_stages(schedule)
    screen.print(
        f"scorer {schedule.scorer.name}, dropped tokens: {schedule.dropped_tokens}, positions {schedule.positions}"
    )
    if schedule.budget:
        costs = schedule.budget
        shares = ", ".join(
            f"{name} {100 * share:.1f}"
            + (f" (asked for {100 * costs.target:.1f})" if name == costs.kind else "")
            for name in get_args(BudgetKind)
            if (share := getattr(costs, name)) is not None
        )
        screen.print(f"cost in % of unpruned: {shares}")
    for line in _reasons(schedule.evidence.get("solver")):
        screen.print(escape(line))
    held_out = schedule.evidence.get("held_out", {})
    results = [
        f"{name} {100 * held_out[method]['exact_match']:.1f} % "
        f"({100 * held_out[method]['ci_low']:.1f}-{100 * held_out[method]['ci_high']:.1f})"
        for method, name in (("schedule", "exact match"), ("full", "full model"))
        if method in held_out and held_out[method]["exact_match"] is not None
    ]
    if results:
        screen.print(f"held out: {', '.join(results)}, n = {held_out['schedule']['n']}")


def _show_stages(schedule: Schedule) -> None:
    """A row per stage, or one sentence for more than `MOST_ROWS` stages."""
    title = f"Schedule for {schedule.backbone.name}, {schedule.backbone.num_layers} layers"
    if len(schedule.stages) > MOST_ROWS:
        stages = ", ".join(f"{stage.layer}: {100 * stage.keep_ratio:.1f}" for stage in schedule.stages)
        screen.print(f"{escape(title)}\n\nkept after layer, in %: {stages}\n")
        return
    table = make_table(title, "tokens leave after layer", "keep ratio", "vision tokens")
    for stage in schedule.stages:
        kept = "" if stage.keep_tokens is None else str(stage.keep_tokens)
        layer = "none: before the decoder" if stage.layer == -1 else str(stage.layer)
        table.add_row(layer, f"{100 * stage.keep_ratio:.1f} %", kept)
    show_table(table)


def _reasons(solver: Any) -> Iterator[str]:
    """The solver's reasons for its choice, one line per subject."""
    if not isinstance(solver, dict):
        return
    said = [f"placed by {solver['placed_by']}"] if "placed_by" in solver else []
    if "retained" in solver:
        said.append(f"{100 * solver['retained']:.1f} % of text-to-vision attention retained in replay")
    if "predicted_kl" in solver:
        said.append(f"KL {_nats(solver['predicted_kl'])} predicted from {solver['measured_samples']} samples")
    if "measured_kl" in solver:
        on = f" on {solver['chosen_on_samples']}" if "chosen_on_samples" in solver else ""
        tried = solver.get("measured_schedules", solver.get("tried"))
        said.append(f"KL {_nats(solver['measured_kl'])} measured{on}, best of {tried} schedules")
    said += [solver["source"]] if "source" in solver else []
    yield f"solver {solver.get('solver', 'unknown')}: {'; '.join(said) or 'no reasons given'}"
    numbers = solver.get("by_number_of_stages", {})
    if numbers and "predicted_kl" in solver:
        by_number = ", ".join(f"{count}: {_nats(best['predicted_kl'])}" for count, best in numbers.items())
        yield f"KL predicted by number of stages: {by_number}"
    alternatives = {
        name: result for name, result in solver.get("rules", {}).items() if any(result["worse_by"])
    }
    if alternatives:
        yield "other scorers on these stages: measured KL, and how much higher (95 %)"
        for name, result in alternatives.items():
            low, high = map(_nats, result["worse_by"])
            yield f"  {name}: {_nats(result['measured_kl'])} ({low} to {high})"
    if "confidence" in solver:
        bands = solver["confidence"]
        often = ", ".join(f"({layers}) {count}" for layers, count in bands["layers"].items())
        yield f"layers chosen in {bands['resamples']} resamples: {often}"


def _nats(divergence: float) -> str:
    return f"{divergence:.2g}"


def show_pareto(table: pd.DataFrame, current: Run) -> None:
    """The front over budgets."""
    shown = make_table(
        "Schedules by budget", "budget", "processed", "flops", "kv", "KL pred.", "KL meas.", "stages"
    )
    for row in table.itertuples():
        shown.add_row(
            *(f"{100 * value:.0f} %" for value in (row.budget, row.processed, row.flops, row.kv)),
            *("" if value != value else f"{value:.3g}" for value in (row.predicted_kl, row.measured_kl)),
            row.stages,
        )
    show_table(shown)
    screen.print(f"table: {current.pareto}", soft_wrap=True)
