"""From the text of an option to its value. Every function raises `InputError` that names the option."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schedule_finder.cli.names import AUTO, BUDGET_KINDS, DROPPED_TOKENS, OLD_NAMES, SOLVER_NAMES
from schedule_finder.errors import InputError

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


def choice(option: str, text: str, names: Sequence[str]) -> str:
    """One of ``names``, or a name of the previous release for one of them."""
    name = text if text in names else OLD_NAMES.get(text, text)
    if name not in names:
        raise InputError(f"{option} {text!r}: choose {', '.join(names)}")
    return name


def solver_options(solver: str, scorer: str, dropped_tokens: str) -> dict[str, Any]:
    """The options of a solver by name; the scorer is checked against the profile later."""
    return {
        "solver": choice("--solver", solver, SOLVER_NAMES),
        "scorer": scorer,
        "dropped_tokens": choice("--dropped-tokens", dropped_tokens, (AUTO, *DROPPED_TOKENS)),
    }


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
    if not text.isdecimal() or int(text) < 2:
        raise InputError(f"--samples {text!r}: must be a whole number of at least 2, or {AUTO}")
    return int(text)


def whole_numbers(option: str, text: str) -> list[int]:
    """``1,8,32``: sorted, each once."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(
            f"{option} {text!r}: must be whole numbers of at least 1 with commas between, as in 1,8,32"
        )
    return sorted({int(part) for part in parts})
