"""The evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schedule_finder.cli.terminal import make_table, screen, show_table
from schedule_finder.evaluation.metrics import metric_label

if TYPE_CHECKING:
    import pandas as pd

    from schedule_finder.run.folder import Run


def show_evaluation(table: pd.DataFrame, current: Run) -> None:
    """For each schedule: the full model, the schedule and its baselines at its budget."""
    import pandas as pd

    overall = table[table.question_type == "all"]
    for name in overall.schedule[overall.method != "full"].unique():
        ours = overall[overall.schedule == name]
        target = ours.budget.iloc[0]  # the schedule itself comes first
        own = ours[(ours.budget - target).abs() < 1e-9]
        _show_methods(pd.concat([overall[overall.method == "full"], own]), name)
        _show_hard_subset(own, name)
    screen.print(
        "score in % with its 95 % interval; same: same answer as the full model; KL of the first answer token; "
        "proc. and publ.: vision tokens, processed and by the published count; KV: cache bytes; time: decoder prefill"
    )
    if overall.draws.notna().any():
        screen.print(
            "x3 and the like: mean of so many random draws, and in brackets their range, not the interval"
        )
    screen.print(f"all question types and budgets: {current.evaluation}", soft_wrap=True)


def _show_methods(own: pd.DataFrame, name: str) -> None:
    """One table; ``own`` has the full model first."""
    full = own.iloc[0]
    shown = make_table(
        f"{name}: {_samples(own)}; costs in % of full",
        *("method", metric_label(full.metric), "same", "KL", "proc.", "publ.", "FLOPs", "KV", "time"),
    )
    for row in own.itertuples():
        shown.add_row(
            f"{row.method} x{row.draws:.0f}" if row.draws == row.draws else row.method,
            _score(row),
            f"{100 * row.agreement:.0f}",
            f"{row.kl:.2f}" if row.kl < 10 else f"{row.kl:.1f}",
            f"{100 * row.processed:.1f}",
            f"{100 * row.published:.1f}",
            f"{100 * row.flops:.0f}",
            f"{100 * row.kv_bytes / full.kv_bytes:.0f}",
            f"{100 * row.prefill_ms / full.prefill_ms:.0f}",
        )
    show_table(shown)


def _samples(own: pd.DataFrame) -> str:
    """How many samples a table is of, and how many of them have a score."""
    count, scored = int(own.n.max()), int(own.scored.max())
    return f"{count} held-out samples" + (f", {scored} with a reference answer" if 0 < scored < count else "")


def _show_hard_subset(own: pd.DataFrame, name: str) -> None:
    """Scores on the hard subset, where the baseline with down-sampled images was run."""
    from schedule_finder.evaluation.hard_subset import describe_hard

    known = own[own.hard_n.notna()]
    if known.empty:
        return
    screen.print(f"{name}: {describe_hard(int(known.hard_n.iloc[0]), int(known.n.max()))}")
    if known.hard_n.iloc[0]:
        shown = make_table(f"{name}: hard subset", "method", "score", "retention")
        for row in known.itertuples():
            score, low, high = (100 * value for value in (row.hard_score, row.hard_low, row.hard_high))
            shown.add_row(
                row.method, f"{score:.1f} ({low:.1f}-{high:.1f})", f"{100 * row.hard_retention:.1f}"
            )
        show_table(shown)


def _score(row: Any) -> str:
    """The score in percent with its interval, or with the range over random draws; F1 where the metric has it."""
    several = row.draws == row.draws and row.score == row.score  # neither is missing
    low, high = (row.draw_low, row.draw_high) if several else (row.score_low, row.score_high)
    text = f"{100 * row.score:.1f} ({100 * low:.1f}-{100 * high:.1f})"
    return f"{text}, F1 {100 * row.f1:.1f}" if row.f1 == row.f1 else text
