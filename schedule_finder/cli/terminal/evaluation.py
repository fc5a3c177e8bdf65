"""The evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from schedule_finder.cli.terminal import make_table, screen, show_table

if TYPE_CHECKING:
    import pandas as pd

    from schedule_finder.run.folder import Run


def show_evaluation(table: pd.DataFrame, current: Run) -> None:
    """The full model, the schedule and its baselines."""
    from pruning_runtime import Schedule

    costs = Schedule.load(current.schedule).budget
    target = costs.target if costs else 1.0
    overall = table[table.question_type == "all"]
    own = overall[(overall.method == "full") | ((overall.budget - target).abs() < 1e-9)]
    full = own[own.method == "full"].iloc[0]
    shown = make_table(
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
    show_table(shown)
    screen.print(
        "exact match in % with its 95 % interval; same: same answer as the full model; KL of the first answer token; "
        "proc. and publ.: vision tokens, processed and by the published count; KV: cache bytes; time: decoder prefill"
    )
    screen.print(f"all question types and budgets: {current.evaluation}", soft_wrap=True)
