"""From the text of an option to its value. Every function raises `InputError` that names the option."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schedule_finder.cli.names import (
    AUTO,
    BASELINE_NAMES,
    BUDGET_KINDS,
    DROPPED_TOKENS,
    MEASURING_SOLVERS,
    MOST_ROWS,
    OLD_NAMES,
    RESERVED_NAMES,
    SCORER_NAMES,
    SOLVER_NAMES,
)
from schedule_finder.errors import InputError
from schedule_finder.profiling.fields import SCORE_FIELDS
from schedule_finder.run.schedules import check_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pruning_runtime.schedule import BudgetKind
    from schedule_finder.search import Search


def fraction(option: str, text: str) -> float:
    """``0.15`` or ``15%``, above 0 and at most 1."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise InputError(f"{option} {text!r} is not a number; write 0.15 or 15%") from None
    if not 0 < value <= 1:
        raise InputError(f"{option} {text}: must be above 0 and at most 1 (or 100%)")
    return value


def number_or_all(option: str, text: str) -> int | None:
    """A positive whole number; None for ``all``."""
    if text == "all":
        return None
    if not text.isdecimal() or not 0 < int(text) < MOST_ROWS:
        raise InputError(f"{option} {text!r}: a whole number above 0, or all")
    return int(text)


def choice(option: str, text: str, names: Sequence[str]) -> str:
    """One of ``names``, or a name of the previous release for one of them."""
    name = text if text in names else OLD_NAMES.get(text, text)
    if name not in names:
        raise InputError(f"{option} {text!r}: choose {', '.join(names)}")
    return name


def solver_options(solver: str, scorer: str, dropped_tokens: str) -> dict[str, Any]:
    """The options of a solver by name. Solvers that do not measure replay the scorers of the profile only."""
    solver = choice("--solver", solver, SOLVER_NAMES)
    return {
        "solver": solver,
        "scorer": choice(
            "--scorer", scorer, (AUTO, *(SCORER_NAMES if solver in MEASURING_SOLVERS else SCORE_FIELDS))
        ),
        "dropped_tokens": choice("--dropped-tokens", dropped_tokens, (AUTO, *DROPPED_TOKENS)),
    }


def schedule_name(text: str) -> str:
    """A name for a schedule, for its file and for the methods of an evaluation."""
    if text in RESERVED_NAMES:
        raise InputError(f"--name {text!r}: is the name of a method of every evaluation; choose another")
    return check_name(text)


def budget_kind(text: str) -> BudgetKind:
    """One of `BUDGET_KINDS`."""
    for kind in BUDGET_KINDS:
        if text == kind:
            return kind
    raise InputError(f"--budget-kind {text!r}: choose {', '.join(BUDGET_KINDS)}")


def check_budget(text: str, kind: BudgetKind) -> None:
    """Check what can be checked before a backbone is loaded."""
    if not text.endswith("ms"):
        fraction("--budget", text)
    elif kind != "latency":
        raise InputError(f"--budget {text}: milliseconds need --budget-kind latency, not {kind}")
    else:
        _milliseconds(text)


def budget_fraction(text: str, search: Search) -> float:
    """A checked budget as a fraction of the unpruned cost."""
    if text.endswith("ms"):
        return search.share_of_prefill(_milliseconds(text))
    return fraction("--budget", text)


def _milliseconds(text: str) -> float:
    try:
        return float(text.removesuffix("ms"))
    except ValueError:
        raise InputError(f"--budget {text!r} is not a number; write 12.5ms") from None


def number_of_samples(text: str) -> int | str:
    """A number of samples, or `AUTO`."""
    if text == AUTO:
        return text
    # A number of more digits than the limit has is not even converted: that takes time.
    if not text.isdecimal() or len(text) > len(str(MOST_ROWS)) or not 2 <= int(text) <= MOST_ROWS:
        raise InputError(f"--samples {text:.40}: must be a whole number from 2 to {MOST_ROWS}, or {AUTO}")
    return int(text)


def check_baselines(text: str | None) -> None:
    """Check the names of ``--baselines``: ``a,b``, ``all``, ``none``, or None for the default."""
    for name in (text or "none").split(","):
        if text not in ("all", "none", None) and name.strip() not in BASELINE_NAMES:
            raise InputError(
                f"--baselines {name.strip()!r}: choose all, none, or some of {', '.join(BASELINE_NAMES)}"
            )


def whole_numbers(option: str, text: str) -> list[int]:
    """``1,8,32``: sorted, each once."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(
            f"{option} {text!r}: must be whole numbers of at least 1 with commas between, as in 1,8,32"
        )
    return sorted({int(part) for part in parts})
