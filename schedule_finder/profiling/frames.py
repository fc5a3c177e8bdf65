"""Profiles as tables with plain columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from schedule_finder.errors import InputError
from schedule_finder.profiling.fields import CURVE_FIELDS, SCORE_FIELDS

if TYPE_CHECKING:
    from schedule_finder.profiling.store import Profile


def curves_table(profile: Profile) -> pd.DataFrame:
    """One row per sample and layer: ``id, layer, num_vision, num_text_queries, vision_mass, vision_entropy``."""
    layers = profile.layers
    table = pd.DataFrame({"id": np.repeat(profile.ids, len(layers)), "layer": np.tile(layers, len(profile))})
    for name in ("num_vision", "num_text_queries"):
        table[name] = np.repeat(profile.counts[name], len(layers))
    return table.assign(**{name: profile.curves[name].ravel() for name in CURVE_FIELDS})


def tokens_table(profile: Profile, sample_id: str) -> pd.DataFrame:
    """One row per layer and vision token: ``layer, token`` and a column for each profiled scorer.

    Raises `InputError` where the profile has no such sample.
    """
    if sample_id not in profile.ids:
        raise InputError(f"no sample {sample_id!r} in the profile; its first one is {profile.ids[0]!r}")
    index = profile.ids.index(sample_id)
    tokens, layers = int(profile.counts["num_vision"][index]), profile.layers
    table = pd.DataFrame(
        {"layer": np.repeat(layers, tokens), "token": np.tile(np.arange(tokens), len(layers))}
    )
    return table.assign(**{name: profile.scores[name][index].ravel() for name in SCORE_FIELDS})
