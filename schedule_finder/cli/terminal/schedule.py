"""Change points, schedules and the front over budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from rich.markup import escape

from schedule_finder.cli.names import AUTO
from schedule_finder.cli.terminal import make_table, screen, show_table
from schedule_finder.evaluation.metrics import metric_label

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

    from pruning_runtime.schedule import Schedule
    from schedule_finder.evidence import (
        Alternative,
        AnswerQuality,
        Evidence,
        HeldOutResult,
        HeldOutSummary,
        PolicyChoice,
        SolverEvidence,
    )
    from schedule_finder.run.folder import Run

MOST_ROWS = 4
"""Up to so many stages have a row each."""
_CHANGE_COLUMNS = (("support", ".0%"), ("effect", ".2f"))


def show_detections(document: dict[str, Any]) -> None:
    """Change points by every detector; regimes, isolated layers, support and effect sizes on one screen."""
    table = make_table("Change points", "detector", "first layer of each new regime")
    for name, entry in document["detectors"].items():
        points = ", ".join(map(str, entry["change_points"])) or "none"
        table.add_row(name + (" (used)" if name == document["default"] else ""), points)
    show_table(table)
    for entry in document["detectors"].values():
        if entry.get("regimes"):
            _show_regimes(entry)
    if document.get("agreement"):
        screen.print(document["agreement"])


def _show_regimes(entry: dict[str, Any]) -> None:
    table = make_table("Regimes", "layers", "support", "effect", "attention pattern")
    changes = {change["layer"]: change for change in entry["changes"]}
    for regime in entry["regimes"]:
        change = changes.get(regime["first"], {})
        shares = [f"{change[key]:{form}}" if key in change else "" for key, form in _CHANGE_COLUMNS]
        table.add_row(f"{regime['first']}-{regime['last']}", *shares, f"{regime['cluster']}")
    show_table(table)
    if entry["isolated_layers"]:
        table = make_table("Isolated layers", "layer", "support", "distance", "nearest layer")
        for layer in entry["isolated_layers"]:
            distance = f"{layer['distance']:.3f} nats"
            table.add_row(str(layer["layer"]), f"{layer['support']:.0%}", distance, str(layer["nearest"]))
        show_table(table)


def show_schedule(schedule: Schedule, held_out: HeldOutSummary | None = None) -> None:
    """Stages, their cost in every unit, the solver's reasons and the held-out results, on one screen."""
    from pruning_runtime.schedule import BudgetKind
    from schedule_finder.evidence import Evidence, digest

    evidence = Evidence.of(schedule)
    _show_stages(schedule)
    screen.print(f"dropped tokens: {schedule.dropped_tokens}, positions {schedule.positions}")
    if schedule.budget:
        costs = schedule.budget
        shares = ", ".join(
            f"{name} {100 * share:.1f}"
            + (f" (asked for {100 * costs.target:.1f})" if name == costs.kind else "")
            for name in get_args(BudgetKind)
            if (share := getattr(costs, name)) is not None
        )
        screen.print(f"cost in % of unpruned: {shares}")
    for line in _reasons(evidence.solver) if evidence.solver else ():
        screen.print(escape(line))
    for line in (*_better_controls(evidence), *_serving_cost(evidence)):
        screen.print(escape(line))
    measured = evidence.solver is not None and bool(evidence.solver.policies)
    if evidence.asked is not None and evidence.asked.scorer == AUTO and not measured:
        screen.print(f"scorer auto: {schedule.scorer.name}, the default; no other scorer was measured")
    own = None if held_out is None else held_out.of(digest(schedule))
    if held_out is not None and own is None:
        screen.print("held out: the stored evaluation is of another schedule; evaluate again")
        _show_quality(evidence.full_model)
        return
    # Version 1 kept the results in the schedule file.
    found = own.methods if own is not None else evidence.held_out
    results = [
        f"{'full model' if method == 'full' else metric_label(result.metric)} {score}"
        for method in ("schedule", "full")
        if (result := found.get(method)) is not None and (score := _score(result)) is not None
    ]
    if results:
        screen.print(f"held out: {', '.join(results)}, n = {found['schedule'].n}")
    _show_quality((held_out.full_model if held_out is not None else None) or evidence.full_model)


def _serving_cost(evidence: Evidence) -> Iterator[str]:
    """What a schedule for a serving engine costs beside the best one of its budget."""
    found = evidence.serving
    if found is not None:
        low, high = map(_nats, found.worse_by)
        yield (
            f"for {found.engine}: KL {_nats(found.measured_kl)}; without the restriction to what it can run "
            f"{_nats(found.unrestricted_kl)} ({found.unrestricted_policy}); difference {low} to {high} nats on "
            f"{found.samples} samples"
        )


def _better_controls(evidence: Evidence) -> Iterator[str]:
    """A warning for each control that would be better than the scorer that the user asked for."""
    from schedule_finder.measuring.token_policy import CONTROLS

    if evidence.asked is None or evidence.asked.scorer == AUTO or evidence.solver is None:
        return
    for name, result in evidence.solver.policies.items():
        if name.split(",")[0] in CONTROLS and result.worse_by[1] < 0:
            low, high = (_nats(-bound) for bound in reversed(result.worse_by))
            yield (
                f"warning: {name} tokens on these stages have a lower KL than --scorer {evidence.asked.scorer}, by {low} to "
                f"{high} nats; leave --scorer out to let the search choose"
            )


def _show_quality(quality: AnswerQuality | None) -> None:
    """The warning about the full model's answers, if there is one."""
    for line in quality.lines() if quality is not None else ():
        screen.print(escape(line), soft_wrap=True)


def _score(result: HeldOutResult) -> str | None:
    """A score with its interval, in percent; None without references. Older files have exact match only."""
    if result.score is not None:
        return f"{100 * result.score:.1f} % ({_percents(result.score_low, result.score_high)})"
    if result.exact_match is not None:
        return f"{100 * result.exact_match:.1f} % ({_percents(result.ci_low, result.ci_high)})"
    return None


def _percents(*shares: float | None) -> str:
    return "-".join("?" if share is None else f"{100 * share:.1f}" for share in shares)


def _show_stages(schedule: Schedule) -> None:
    """A row per stage, or one sentence for more than `MOST_ROWS` stages."""
    title = f"Schedule for {schedule.backbone.name}, {schedule.backbone.num_layers} layers"
    if len(schedule.stages) > MOST_ROWS:
        stages = ", ".join(f"{stage.layer}: {100 * stage.keep_ratio:.1f}" for stage in schedule.stages)
        screen.print(f"{escape(title)}\n\nkept after layer, in %: {stages}\n")
        return
    table = make_table(title, "tokens leave after layer", "keep ratio", "vision tokens", "scorer")
    for stage in schedule.stages:
        kept = "" if stage.keep_tokens is None else str(stage.keep_tokens)
        layer = "none: before the decoder" if stage.layer == -1 else str(stage.layer)
        scorer = (stage.scorer or schedule.scorer).name
        table.add_row(layer, f"{100 * stage.keep_ratio:.1f} %", kept, scorer)
    show_table(table)


def _reasons(solver: SolverEvidence) -> Iterator[str]:
    """The solver's reasons for its choice, one line per subject."""
    reasons = [f"placed by {solver.placed_by}"] if solver.placed_by else []
    if solver.retained is not None:
        reasons.append(f"{100 * solver.retained:.1f} % of text-to-vision attention retained in replay")
    if solver.predicted_kl is not None:
        reasons.append(f"KL {_nats(solver.predicted_kl)} predicted from {solver.measured_samples} samples")
    if solver.measured_kl is not None:
        on = f" on {solver.chosen_on_samples}" if solver.chosen_on_samples else ""
        tried = solver.measured_schedules
        reasons.append(f"KL {_nats(solver.measured_kl)} measured{on}, best of {tried} schedules")
    if solver.answer_tokens is not None:
        first = solver.answer_tokens == 1
        reasons.append(
            "KL of the first token" if first else f"KL over up to {solver.answer_tokens} answer tokens"
        )
    reasons += [solver.source] if solver.source else []
    yield f"solver {solver.solver}: {'; '.join(reasons) or 'no reasons given'}"
    by_number = ", ".join(
        f"{count}: {_nats(best.predicted_kl)}"
        for count, best in solver.by_number_of_stages.items()
        if best.predicted_kl is not None
    )
    if by_number:
        yield f"KL predicted by number of stages: {by_number}"
    yield from _compared_rules(solver)
    if solver.policy_choice is not None:
        yield _why_policy(solver.policy_choice)
    others = {name: result for name, result in solver.policies.items() if any(result.worse_by)}
    if others:
        yield "other policies on these stages: measured KL, and how much higher (95 %)"
        for name, result in others.items():
            low, high = map(_nats, result.worse_by)
            yield f"  {name}: {_nats(result.measured_kl)} ({low} to {high})"
    if solver.confidence is not None:
        often = ", ".join(f"({layers}) {count}" for layers, count in solver.confidence.layers.items())
        yield f"layers chosen in {solver.confidence.resamples} resamples: {often}"


_PLACES = {"pre_decoder": "before the decoder", "decoder": "in the decoder"}


def _compared_rules(solver: SolverEvidence) -> Iterator[str]:
    """The scorers that were compared on single stages, the best first, one line per place."""
    for place, words in _PLACES.items():
        rules = [rule for rule in solver.compared_rules if rule.place == place]
        # Those of the final round first; a mean over fewer samples cannot be compared with them.
        rules.sort(key=lambda rule: (-rule.samples, rule.kl))
        if rules:
            most = rules[0].samples
            shown = ", ".join(
                rule.scorer
                + (f" ({rule.dropped_tokens})" if rule.dropped_tokens != "discard" else "")
                + f" {_nats(rule.kl)}"
                + ("" if rule.samples == most else f" (on {rule.samples})")
                for rule in rules
            )
            yield f"scorers {words}, KL of single stages on {most} samples: {shown}"
    for policy, reason in solver.refused_rules.items():
        yield f"not usable here: {policy}: {reason}"
    best = sorted(
        (one for one in solver.candidates if one.measured_kl is not None and one.worse_by is not None),
        key=lambda one: one.measured_kl or 0.0,
    )
    if any(one.policy for one in best):
        yield "whole schedules that were tried, the best first: measured KL, and how much higher (95 %)"
        for one in best:
            low, high = map(_nats, one.worse_by or (0.0, 0.0))
            yield f"  {_staged(one)}: {_nats(one.measured_kl or 0.0)} ({low} to {high})"


def _staged(candidate: Alternative) -> str:
    """Layers, keep ratios in percent, and policy of a candidate."""
    stages = " ".join(f"{stage.layer}:{100 * stage.keep_ratio:.0f}%" for stage in candidate.stages)
    return f"{stages}, {candidate.policy}"


def _why_policy(choice: PolicyChoice) -> str:
    """Why this scorer and dropped-token setting, in one sentence."""
    low, high = choice.interval
    excess = f"{choice.difference:.2g} nats (95 % interval {_nats(low)} to {_nats(high)})"
    reasons = {
        "preferred is best": "preferred, and of least measured KL",
        "preferred within tolerance": f"preferred; measured KL is higher than that of {choice.compared} by {excess}, "
        f"within the tolerance of {_nats(choice.tolerance)}",
        "significantly better": f"measured KL is lower than that of {choice.preferred}, which is preferred, by {excess}; "
        "the interval excludes zero",
        "beyond tolerance": f"measured KL is lower than that of {choice.preferred}, which is preferred, by {excess}, "
        f"more than the tolerance of {_nats(choice.tolerance)}",
        "control is not worse": "it reads nothing, and its measured KL is not higher than that of the best scorer "
        f"({choice.preferred} is higher by {excess})",
    }
    return f"chosen on {choice.samples} samples: {choice.chosen}: {reasons[choice.rule]}"


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
