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
        PolicyResult,
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
    used = document["detectors"].get(document["default"], {}).get("evidence") or {}
    read, samples = used.get("num_samples"), document.get("samples", 0)
    if read and read < samples:
        screen.print(f"{document['default']} used {read} of {samples} samples")


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
        screen.print(f"held out: {', '.join(results)}, n = {(found.get('schedule') or found['full']).n}")
    _show_quality((held_out.full_model if held_out is not None else None) or evidence.full_model)


def _serving_cost(evidence: Evidence) -> Iterator[str]:
    """What a schedule for a serving engine costs beside the best one of its budget."""
    found = evidence.serving
    if found is not None:
        yield (
            f"for {found.engine}: answer change {_share(found.measured_change)}; without the restriction to what it can "
            f"run {_share(found.unrestricted_change)} ({found.unrestricted_policy}); difference "
            f"{_interval(found.worse_by, found.measured_change)} on {found.samples} samples"
        )


def _better_controls(evidence: Evidence) -> Iterator[str]:
    """A warning for each control that would be better than the scorer that the user asked for."""
    from schedule_finder.measuring.token_policy import CONTROLS

    if evidence.asked is None or evidence.asked.scorer == AUTO or evidence.solver is None:
        return
    for name, result in evidence.solver.policies.items():
        if name.split(",")[0] in CONTROLS and result.worse_by[1] < 0:
            low, high = (-bound for bound in reversed(result.worse_by))
            yield (
                f"warning: {name} tokens on these stages change fewer answers than --scorer {evidence.asked.scorer}, by "
                f"{_interval((low, high), result.measured_change)}; leave --scorer out to let the search choose"
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
    if (predicted := _predicted(solver)) is not None:
        reasons.append(f"{predicted} predicted from {solver.measured_samples} samples")
    if solver.measured_kl is not None:
        on = f" on {solver.chosen_on_samples}" if solver.chosen_on_samples else ""
        tried = solver.measured_schedules
        reasons.append(f"{_measured(solver)} measured{on}, best of {tried} schedules")
    if solver.answer_tokens is not None:
        first = solver.answer_tokens == 1
        reasons.append(
            "KL of the first token" if first else f"KL over up to {solver.answer_tokens} answer tokens"
        )
    reasons += [solver.source] if solver.source else []
    yield f"solver {solver.solver}: {'; '.join(reasons) or 'no reasons given'}"
    by_number = ", ".join(
        f"{count}: {predicted}"
        for count, best in solver.by_number_of_stages.items()
        if (predicted := _predicted(best)) is not None
    )
    if by_number:
        yield f"predicted by number of stages: {by_number}"
    yield from _compared_rules(solver)
    if solver.policy_choice is not None:
        yield _why_policy(solver.policy_choice)
    others = {name: result for name, result in solver.policies.items() if any(result.worse_by)}
    if others:
        yield "other policies on these stages, and how much worse (95 %)"
        for name, result in others.items():
            worse = _interval(result.worse_by, result.measured_change)
            few = result.samples is not None and result.samples < (solver.chosen_on_samples or 0)
            yield f"  {name}: {_measured(result)} ({worse}" + (f", on {result.samples})" if few else ")")
    if solver.confidence is not None:
        often = ", ".join(f"({layers}) {count}" for layers, count in solver.confidence.layers.items())
        yield f"layers chosen in {solver.confidence.resamples} resamples: {often}"


_PLACES = {"pre_decoder": "before the decoder", "decoder": "in the decoder"}


def _compared_rules(solver: SolverEvidence) -> Iterator[str]:
    """The scorers that were compared on single stages, the best first, one line per place."""
    for place, words in _PLACES.items():
        rules = [rule for rule in solver.compared_rules if rule.place == place]
        # Those of the final round first; a mean over fewer samples cannot be compared with them.
        rules.sort(key=lambda rule: (-rule.samples, rule.loss))
        if rules:
            most = rules[0].samples
            shown = ", ".join(
                rule.scorer
                + (f" ({rule.dropped_tokens})" if rule.dropped_tokens != "discard" else "")
                + f" {_share(rule.change) if rule.change is not None else _nats(rule.kl)}"
                + ("" if rule.samples == most else f" (on {rule.samples})")
                for rule in rules
            )
            what = "KL" if rules[0].change is None else "answer change"
            yield f"scorers {words}, {what} of single stages on {most} samples: {shown}"
    for policy, reason in solver.refused_rules.items():
        yield f"not usable here: {policy}: {reason}"
    best = sorted(
        (one for one in solver.candidates if one.measured_kl is not None and one.worse_by is not None),
        key=lambda one: one.measured_change or one.measured_kl or 0.0,
    )
    if any(one.policy for one in best):
        yield "whole schedules that were tried, the best first, and how much worse (95 %)"
        for one in best:
            worse = _interval(one.worse_by or (0.0, 0.0), one.measured_change)
            yield f"  {_staged(one)}: {_measured(one)} ({worse})"


def _staged(candidate: Alternative) -> str:
    """Layers, keep ratios in percent, and policy of a candidate."""
    stages = " ".join(f"{stage.layer}:{100 * stage.keep_ratio:.0f}%" for stage in candidate.stages)
    return f"{stages}, {candidate.policy}"


def _why_policy(choice: PolicyChoice) -> str:
    """Why this scorer and dropped-token setting, in one sentence."""
    what = f"measured {choice.measure}"
    shown = _points if choice.measure == "answer change" else lambda value: f"{_nats(value)} nats"
    low, high = map(shown, choice.interval)
    excess = f"{shown(choice.difference)} (95 % interval {low} to {high})"
    tolerance = shown(choice.tolerance)
    reasons = {
        "preferred is best": f"preferred, and of least {what}",
        "preferred within tolerance": f"preferred; {what} is higher than that of {choice.compared} by {excess}, within "
        f"the tolerance of {tolerance}",
        "significantly better": f"{what} is lower than that of {choice.preferred}, which is preferred, by {excess}; "
        "the interval excludes zero",
        "beyond tolerance": f"{what} is lower than that of {choice.preferred}, which is preferred, by {excess}, "
        f"more than the tolerance of {tolerance}",
        "control is not worse": f"it reads nothing, and its {what} is not higher than that of the best scorer "
        f"({choice.preferred} is higher by {excess})",
    }
    return f"chosen on {choice.samples} samples: {choice.chosen}: {reasons[choice.rule]}"


def _predicted(one: SolverEvidence | Alternative) -> str | None:
    """What a solver predicts, with its unit; None where it does not."""
    if one.predicted_change is not None:
        return f"answer change {_share(one.predicted_change)}"
    return None if one.predicted_kl is None else f"KL {_nats(one.predicted_kl)}"


def _measured(one: SolverEvidence | Alternative | PolicyResult) -> str:
    """What was measured, with its unit; files of earlier releases have the KL alone."""
    kl = f"KL {_nats(one.measured_kl or 0.0)}"
    return kl if one.measured_change is None else f"answer change {_share(one.measured_change)}, {kl}"


def _interval(bounds: tuple[float, float], measured_change: float | None) -> str:
    """An interval of differences: points of answer change, or nats where no answer change was measured."""
    if measured_change is None:
        return f"{_nats(bounds[0])} to {_nats(bounds[1])} nats"
    return f"{100 * bounds[0]:.2g} to {_points(bounds[1])}"


def _share(change: float) -> str:
    return f"{100 * change:.2g} %"


def _points(difference: float) -> str:
    return f"{100 * difference:.2g} points"


def _nats(divergence: float) -> str:
    return f"{divergence:.2g}"


_FRONT = ("change pred.", "change meas.")


def show_pareto(table: pd.DataFrame, current: Run) -> None:
    """The front over budgets."""
    shown = make_table("Schedules by budget", "budget", "processed", "flops", "kv", *_FRONT, "stages")
    for row in table.itertuples():
        shown.add_row(
            *(f"{100 * value:.0f} %" for value in (row.budget, row.processed, row.flops, row.kv)),
            *(
                "" if value != value else _share(value)
                for value in (row.predicted_change, row.measured_change)
            ),
            row.stages,
        )
    show_table(shown)
    screen.print(f"table: {current.pareto}", soft_wrap=True)
