"""Tables on the terminal; the only module that imports rich's tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, get_args

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from schedule_finder.models.verified_families import VerifiedFamily

if TYPE_CHECKING:
    from pruning_runtime import Schedule
    from schedule_finder.evidence import HeldOutSummary, SolverEvidence
    from schedule_finder.run.folder import Run

screen = Console()
MOST_ROWS = 4
"""Stages that have a row each."""


def _table(title: str, *columns: str) -> Table:
    """A table that fits eighty columns: no frame, and only its last column wraps."""
    heads = [Column(name, no_wrap=name != columns[-1], overflow="fold") for name in columns]
    return Table(
        *heads,
        title=escape(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


def show_detections(document: dict[str, Any]) -> None:
    """Change points by every detector."""
    table = _table("Change points", "detector", "first layer of each new regime")
    for name, entry in document["detectors"].items():
        points = ", ".join(map(str, entry["change_points"])) or "none"
        table.add_row(name + (" (used)" if name == document["default"] else ""), points)
    screen.print(table)


def show_schedule(schedule: Schedule, held_out: HeldOutSummary | None = None) -> None:
    """Stages, what they cost by every count, why they were chosen, and their held-out results: one screen."""
    from pruning_runtime.schedule import BudgetKind
    from schedule_finder.evidence import Evidence, digest

    evidence = Evidence.of(schedule)
    _show_stages(schedule)
    screen.print(
        f"scorer {schedule.scorer.name}, dropped tokens {schedule.dropped_tokens}, positions {schedule.positions}"
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
    for line in _reasons(evidence.solver) if evidence.solver else ():
        screen.print(escape(line))
    if held_out is not None and held_out.schedule != digest(schedule):
        screen.print("held out: the stored evaluation is of another schedule; evaluate again")
        return
    # Version 1 kept the results in the schedule file.
    found = held_out.methods if held_out is not None else evidence.held_out
    results = [
        f"{name} {100 * result.exact_match:.1f} % ({_percents(result.ci_low, result.ci_high)})"
        for method, name in (("schedule", "exact match"), ("full", "full model"))
        if (result := found.get(method)) is not None and result.exact_match is not None
    ]
    if results:
        screen.print(f"held out: {', '.join(results)}, n = {found['schedule'].n}")


def _percents(*shares: float | None) -> str:
    return "-".join("?" if share is None else f"{100 * share:.1f}" for share in shares)


def _show_stages(schedule: Schedule) -> None:
    """A row for each stage; of more than fit a screen (a stage after every layer), one sentence."""
    title = f"Schedule for {schedule.backbone.name}, {schedule.backbone.num_layers} layers"
    if len(schedule.stages) > MOST_ROWS:
        stages = ", ".join(f"{stage.layer}: {100 * stage.keep_ratio:.1f}" for stage in schedule.stages)
        screen.print(f"{escape(title)}\n\nkept after layer, in %: {stages}\n")
        return
    table = _table(title, "tokens leave after layer", "keep", "vision tokens")
    for stage in schedule.stages:
        kept = "" if stage.keep_tokens is None else str(stage.keep_tokens)
        place = "none: before the decoder" if stage.layer == -1 else str(stage.layer)
        table.add_row(place, f"{100 * stage.keep_ratio:.1f} %", kept)
    screen.print(table)


def _reasons(solver: SolverEvidence) -> Iterator[str]:
    """What a solver says about its choice, a line for each thing."""
    said = [f"placed by {solver.placed_by}"] if solver.placed_by else []
    if solver.retained is not None:
        said.append(f"{100 * solver.retained:.1f} % of text-to-vision attention retained in replay")
    if solver.predicted_kl is not None:
        said.append(f"KL {_nats(solver.predicted_kl)} predicted from {solver.measured_samples} samples")
    if solver.measured_kl is not None:
        on = f" on {solver.chosen_on_samples}" if solver.chosen_on_samples else ""
        tried = solver.measured_schedules
        said.append(f"KL {_nats(solver.measured_kl)} measured{on}, best of {tried} schedules")
    said += [solver.source] if solver.source else []
    yield f"solver {solver.solver}: {'; '.join(said) or 'no reasons given'}"
    by_number = ", ".join(
        f"{count}: {_nats(best.predicted_kl)}"
        for count, best in solver.by_number_of_stages.items()
        if best.predicted_kl is not None
    )
    if by_number:
        yield f"KL predicted by number of stages: {by_number}"
    others = {name: result for name, result in solver.policies.items() if any(result.worse_by)}
    if others:
        yield "other policies on these stages: KL measured, and how much worse (95 %)"
        for name, result in others.items():
            low, high = map(_nats, result.worse_by)
            yield f"  {name}: {_nats(result.measured_kl)} ({low} to {high})"
    if solver.confidence is not None:
        often = ", ".join(f"({layers}) {count}" for layers, count in solver.confidence.layers.items())
        yield f"layers chosen in {solver.confidence.resamples} resamples: {often}"


def _nats(divergence: float) -> str:
    return f"{divergence:.2g}"


def show_pareto(table: Any, current: Run) -> None:
    """The front over budgets."""
    shown = _table(
        "Schedules by budget", "budget", "processed", "flops", "kv", "KL pred.", "KL meas.", "stages"
    )
    for row in table.itertuples():
        shown.add_row(
            *(f"{100 * value:.0f} %" for value in (row.budget, row.processed, row.flops, row.kv)),
            *("" if value != value else f"{value:.3g}" for value in (row.predicted_kl, row.measured_kl)),
            row.stages,
        )
    screen.print(shown)
    screen.print(f"table: {current.pareto}", soft_wrap=True)


def show_evaluation(table: Any, current: Run) -> None:
    """The full model, the schedule and its baselines."""
    from pruning_runtime import Schedule

    costs = Schedule.load(current.schedule).budget
    target = costs.target if costs else 1.0
    overall = table[table.question_type == "all"]
    own = overall[(overall.method == "full") | ((overall.budget - target).abs() < 1e-9)]
    full = own[own.method == "full"].iloc[0]
    shown = _table(
        f"{int(own.n.max())} held-out samples; costs in % of full",
        *("method", "exact match", "same", "KL", "proc.", "publ.", "FLOPs", "KV", "time"),
    )
    for row in own.itertuples():
        shown.add_row(
            row.method,
            f"{100 * row.exact_match:.1f} ({100 * row.ci_low:.1f}-{100 * row.ci_high:.1f})",
            f"{100 * row.agreement:.1f}",
            f"{row.kl:.2f}" if row.kl < 10 else f"{row.kl:.1f}",
            f"{100 * row.processed:.1f}",
            f"{100 * row.published:.1f}",
            f"{100 * row.flops:.0f}",
            f"{100 * row.kv_bytes / full.kv_bytes:.0f}",
            f"{100 * row.prefill_ms / full.prefill_ms:.0f}",
        )
    screen.print(shown)
    screen.print(
        "exact match in % with its 95 % interval; same: answers as full does; KL of the first answer token; proc. "
        "and publ.: vision tokens computed by either count; KV: cache bytes; time: prefill of the decoder"
    )
    screen.print(f"every question type and budget: {current.evaluation}", soft_wrap=True)


def show_run(current: Run) -> None:
    """The steps of a run, and its schedule where there is one."""
    from pruning_runtime import Schedule

    table = _table(f"Run {current.folder}", "step", "state", "seconds", "facts")
    for name, entry in current.document()["steps"].items():
        facts = ", ".join(f"{key} {value}" for key, value in entry.items() if key not in ("state", "seconds"))
        table.add_row(name, entry["state"], str(entry.get("seconds", "")), facts)
    screen.print(table)
    if current.schedule.exists():
        from schedule_finder.evidence import HeldOutSummary

        show_schedule(Schedule.load(current.schedule), HeldOutSummary.load(current.evaluation_summary))


def show_backbone(name: str, facts: dict[str, Any]) -> None:
    """What is known of a backbone."""
    table = _table(f"Backbone {name}", "fact", "value")
    for key, value in facts.items():
        table.add_row(key, escape(str(value)))
    screen.print(table)


def show_families(families: Sequence[VerifiedFamily]) -> None:
    """Families on which pruning was shown to be exact, and how."""
    table = _table("Verified families", "family", "class", "media", "decoder")
    for family in families:
        kinds = ", ".join(kind.removesuffix("_attention") for kind in family.kinds)
        against = "" if family.reference == "masking" else family.reference
        place = "" if family.layers == VerifiedFamily.layers else family.layers
        since = "" if family.since == VerifiedFamily.since else f"from {family.since}"
        table.add_row(
            family.name,
            family.model_class.removesuffix("ForConditionalGeneration"),
            ", ".join(family.media),
            "; ".join(filter(None, (kinds, against, place, since, family.note))),
        )
    screen.print(table)
    screen.print(
        "Pruned generation equals masking (or compaction, where said) over five tokens under two schedules, in "
        "float32, padded and ragged batches, on small instances with random weights; transformers 5.17 and 5.23 unless "
        f"said. Layers are at {VerifiedFamily.layers} unless said; class names lack their ForConditionalGeneration."
    )


def show_benchmark(document: dict[str, Any]) -> None:
    """Two tables for each batch size: how fast, and where the time to the first token goes."""
    from schedule_finder.benchmark import ran_on

    rows = benchmark_rows(document)
    said = [document["backbone"]["name"], *([document["note"]] if document["note"] else [])]
    prompt, last = document["prompt"], document["lengths"][-1]
    fast = any(result["fast"] for result in document["results"])
    path = ["path"] if fast else []
    for batch, (speed, parts) in rows.items():
        rounds = next(result["rounds"] for result in document["results"] if result["batch"] == batch)
        whole = sum(row["new_tokens"] == last for row in rounds)
        title = f"batch {batch}: {prompt['vision_tokens']} vision + {prompt['text_tokens']} text tokens, "
        title += f"{len(rounds)} rounds, {whole} of them to {last} tokens"
        shown = _table(
            title, "ms", "proc.", "dec.", "%", *path, "FLOPs", "first", "token", str(last), "faster"
        )
        for row in speed:
            shown.add_row(*row)
        screen.print(shown)
        shown = _table("ms to the first token, and MB", "ms", "tower", "proj.", "layers", "scor.", "drop.", "head",
                       "other", "MB", "cache")  # fmt: skip
        for row in parts:
            shown.add_row(*row)
        screen.print(shown)
    columns = {
        "proc.": "vision tokens computed, in %",
        "dec.": "the decoder's prefill with scoring and dropping, and in % of unpruned",
        **({"path": "in % of unpruned on the same path"} if fast else {}),
        "FLOPs": "of the decoder's prefill, in %",
        "first": "time to the first token",
        "token": "each further one",
        str(last): "all of so many",
        "faster": "from or up to how many new tokens it beats unpruned",
        "roofline": "least that the schedule's layers take at the rates measured in between",
        **({"*": "part of layers, since a captured graph cannot be divided"} if fast else {}),
        "MB": "most held beyond the weights",
        "cache": "of the prompt, MB",
    }
    screen.print(
        "Medians over rounds; parts are means over the middle half of them. "
        + "; ".join(f"{name}: {meaning}" for name, meaning in columns.items())
    )
    for one in document["failed"]:
        screen.print(
            escape(f"left out: batch {one['batch']}, {one['baseline']}: {one['reason']}"), soft_wrap=True
        )
    screen.print(
        f"{', '.join(said)}; {document['environment']['dtype']} on {ran_on(document)}", soft_wrap=True
    )
    screen.print(f"schedule: {document['schedule']['source']}", soft_wrap=True)


def benchmark_rows(document: dict[str, Any]) -> dict[int, tuple[list[list[str]], list[list[str]]]]:
    """What `show_benchmark` shows: by batch size the rows of its two tables."""
    from schedule_finder.benchmark import PREFILL_PARTS, faster_text

    last = str(document["lengths"][-1])
    fast = any(result["fast"] for result in document["results"])
    shown: dict[int, tuple[list[list[str]], list[list[str]]]] = {}
    bounds = {
        result["batch"]: result["roofline_ms"]
        for result in document["results"]
        if result["baseline"] == "schedule"
    }
    for result in document["results"]:
        speed, parts = shown.setdefault(result["batch"], ([], []))
        token, same = result["token_ms"], result["same_path_ratio"]
        speed.append(
            [
                result["baseline"],
                _percent(result["processed"]),
                _ms(result["decoder_ms"]["median"]),
                _percent(result["decoder_ratio"]["median"]),
                *([_percent(same["median"]) if same else ""] if fast else []),
                _percent(result["flops_ratio"]),
                _ms(result["first_token_ms"]["median"]),
                "" if token is None else _ms(token["median"]),
                _ms(result["total_ms"][last]["median"]),
                faster_text(result["faster"]),
            ]
        )
        parts.append(
            [
                result["baseline"],
                *(
                    "*" if (spent := result["prefill"][part]) is None else _ms(spent)
                    for part in PREFILL_PARTS
                ),
                f"{result['peak_bytes'] / 1e6:.0f}",
                f"{result['cache_bytes'] / 1e6:.1f}",
            ]
        )
    for batch, bound in bounds.items():
        speed = shown[batch][0]
        speed.append(["roofline", "", _ms(bound), *[""] * (len(speed[0]) - 3)])
    return shown


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f}" if percent >= 99.95 else f"{percent:.1f}"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
