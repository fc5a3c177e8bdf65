"""The result of `inspect --verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from schedule_finder.cli.terminal import make_table, screen, show_table

if TYPE_CHECKING:
    from schedule_finder.verification import Check, Verification

_WORDS = {
    "exact": "pruning this backbone is exact",
    "differs": "pruning this backbone is NOT exact; please report it (issue template: verify my model)",
    "inconclusive": "rounding is too large to tell; use --dtype float32",
}


def show_verification(name: str, found: Verification) -> None:
    """A row per scorer, the reasons, and the verdict."""
    columns = ("scorer", "result", "difference", "pruning changes", "stages")
    table = make_table(f"Pruned against masked: {name}, {found.dtype}", *columns)
    for check in found.checks:
        table.add_row(
            check.scorer, check.result, _number(check.difference), _number(check.pruning), _stages(check)
        )
    show_table(table)
    for check in found.checks:
        if check.reason is not None:
            screen.print(escape(f"{check.scorer}: {check.reason}"), soft_wrap=True)
    prompts = " and ".join(map(str, found.prompts))
    screen.print(
        f"difference: largest of any logit, relative to the largest one; up to {found.bound:.1e} is rounding on this "
        f"model. Prompts with {prompts} vision tokens.",
        soft_wrap=True,
    )
    screen.print(f"verdict: [bold]{found.verdict}[/bold], {_WORDS[found.verdict]}", soft_wrap=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _stages(check: Check) -> str:
    return ", ".join("before" if layer < 0 else str(layer) for layer in check.stages) or "-"
