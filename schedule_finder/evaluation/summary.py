"""The summary of an evaluation: what `inspect` shows beside the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from schedule_finder.evidence import AnswerQuality, HeldOutResult, HeldOutSummary
from schedule_finder.run.schedules import NamedSchedule


def summarize(
    first: NamedSchedule, chosen: Sequence[NamedSchedule], table: pd.DataFrame, quality: AnswerQuality
) -> HeldOutSummary:
    """The summary of ``first`` with those of the others in it."""
    others = [_summary_of(one, table, quality) for one in chosen if one is not first]
    return _summary_of(first, table, quality).model_copy(update={"others": others})


def _summary_of(named: NamedSchedule, table: pd.DataFrame, quality: AnswerQuality) -> HeldOutSummary:
    """The full model, the schedule and its baselines at its budget, over all question types."""
    budget = named.schedule.budget.target if named.schedule.budget else 1.0
    ours = (table.schedule == named.name) & np.isclose(table.budget, budget)
    own = table[(table.question_type == "all") & ((table.method == "full") | ours)]
    names = [name for name in HeldOutResult.model_fields if name != "n"]
    return HeldOutSummary(
        schedule=named.digest,
        name=named.name,
        budget=budget,
        samples=int(own.n.max()),
        full_model=quality,
        methods={
            "schedule" if row["method"] == named.name else row["method"]: HeldOutResult.model_validate(
                {"n": row["n"]} | {name: _fact(row[name]) for name in names}
            )
            for row in own.to_dict("records")
        },
    )


def _fact(value: Any) -> str | float | None:
    """A cell of the table as the summary keeps it."""
    if pd.isna(value):
        return None
    return value if isinstance(value, str) else round(float(value), 6)
