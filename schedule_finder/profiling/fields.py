"""What a profile holds per sample: names of its fields and one row. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MOST_QUERIES = 128
"""Text queries of a sample whose attention is profiled, by default; see `draw_queries`."""

SCORE_FIELDS = ("uniform_text", "text_guided", "last_token")
"""One number per layer and vision token; the scorer of the same name ranks tokens by it."""

CURVE_FIELDS = ("vision_mass", "vision_entropy")
"""One number per layer; see `ProfileRow`."""


@dataclass(frozen=True)
class ProfileRow:
    """The profile of one sample. ``layers`` in the shapes: those of `layers_to_profile`, in order.

    Attributes:
        num_vision: vision tokens.
        num_text_queries: text queries.
        num_other: valid tokens that are not vision tokens.
        scores: `SCORE_FIELDS` to float32 ``[layers, num_vision]``. ``uniform_text`` is the attention of the
            text queries to each vision token, averaged over heads and text queries; ``text_guided`` and
            ``last_token`` are those scorers' sums over heads.
        curves: `CURVE_FIELDS` to float32 ``[layers]``. ``vision_mass`` is the share of the text queries'
            attention on vision tokens, in [0, 1]; ``vision_entropy`` the mean entropy, in bits, of a text
            query's attention within the vision tokens.
    """

    num_vision: int
    num_text_queries: int
    num_other: int
    scores: dict[str, np.ndarray]
    curves: dict[str, np.ndarray]
