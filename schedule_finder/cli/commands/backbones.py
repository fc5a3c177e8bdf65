"""`backbones`: the verified families."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from schedule_finder.cli.runner import command
from schedule_finder.cli.terminal.families import show_families


@command
def backbones() -> dict[str, Any]:
    """Families on which the tests show pruning to be exact. Other families are tried, or refused by name."""
    from schedule_finder.models.verified_families import VERIFIED

    show_families(list(VERIFIED.values()))
    return {key: asdict(family) | {"reference": family.reference} for key, family in VERIFIED.items()}
