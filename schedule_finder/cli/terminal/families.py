"""The verified families."""

from __future__ import annotations

from typing import TYPE_CHECKING

from schedule_finder.cli.terminal import make_table, screen, show_table
from schedule_finder.models.verified_families import VerifiedFamily

if TYPE_CHECKING:
    from collections.abc import Sequence


def show_families(families: Sequence[VerifiedFamily]) -> None:
    """One row per family: its class, media, and what the tests compared it with."""
    table = make_table("Verified families", "family", "class", "media", "decoder")
    for family in families:
        kinds = ", ".join(kind.removesuffix("_attention") for kind in family.kinds)
        reference = "" if family.reference == "masking" else family.reference
        layers = "" if family.layers == VerifiedFamily.layers else family.layers
        since = "" if family.since == VerifiedFamily.since else f"from {family.since}"
        table.add_row(
            family.name,
            family.model_class.removesuffix("ForConditionalGeneration"),
            ", ".join(family.media),
            "; ".join(filter(None, (kinds, reference, layers, since, family.note))),
        )
    show_table(table)
    screen.print(
        "Pruned generation equals masking (or compaction, where noted) over five tokens under two schedules, in float32, "
        "for padded and ragged batches, on small instances with random weights; with transformers 5.17 and 5.23 unless "
        f"noted. Layers are at {VerifiedFamily.layers} unless noted; class names omit ForConditionalGeneration."
    )
