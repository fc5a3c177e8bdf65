"""What a reader of an evaluation must know and would not see in its table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from schedule_finder.measuring.token_policy import CONTROLS

if TYPE_CHECKING:
    import pandas as pd

    from schedule_finder.evaluation.methods import Method


NOTABLE = 1.05
"""Times of the full model's prefill from which a schedule is called slower: less is noise."""


def remarks(table: pd.DataFrame) -> Iterator[str]:
    """Lines about samples without a reference answer, and about schedules that are slower than the full model."""
    overall = table[table.question_type == "all"]
    samples, scored = int(overall.n.max()), int(overall.scored.max())
    if 0 < scored < samples:
        yield (
            f"{samples - scored} of {samples} samples have no reference answer: scores and their intervals are over the "
            f"other {scored}"
        )
    for schedule, rows in overall[overall.method != "full"].groupby("schedule"):
        ours = rows[rows.method.isin(["schedule", schedule])]
        if len(ours) and (line := slower_than_full(table, ours.iloc[0])) is not None:
            yield f"warning: {line}"


def slower_than_full(table: pd.DataFrame, ours: Any) -> str | None:
    """A sentence where the schedule's prefill took longer than the full model's; ``ours`` is its row."""
    full = table[table.method == "full"]
    if full.empty or not ours.prefill_ms > NOTABLE * full.iloc[0].prefill_ms:
        return None
    ranks = isinstance(ours.scorer, str) and ours.scorer not in CONTROLS
    reason = f", as ranking tokens by {ours.scorer} costs more than is saved" if ranks else ""
    return (
        f"The schedule is no gain on this device: its prefill took {ours.prefill_ms / full.iloc[0].prefill_ms:.0%} of the "
        f"full model's time{reason}. Search with another --scorer, or with --budget-kind latency."
    )


def left_out(names: Sequence[str], methods: Sequence[Method]) -> list[str]:
    """Baselines that were asked for and have no method: schedule, backbone or data do not allow them."""
    there = {method.name for method in methods}
    scorers = {
        (stage.scorer or one.schedule.scorer).name for one in methods[:1] for stage in one.schedule.stages
    }
    is_merged = any(one.schedule.dropped_tokens == "merge" for one in methods)
    return [
        name
        for name in names
        if not {name, name.replace("-", " ")} & there
        and name not in scorers
        and not (name == "not-merged" and not is_merged)
        and name != "smaller-images"  # has a remark of its own
    ]
