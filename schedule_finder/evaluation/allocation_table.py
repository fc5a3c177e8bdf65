"""The table ``5_allocation.csv``: its columns and how it is read. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from schedule_finder.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

KEYS = ("system", "vision", "question", "answer")
"""What is attended to: text before a row's first vision token, vision tokens, later text of the prompt, the answer."""
QUERIES = ("question", "answer")
"""What attends: the text queries of the prompt; the positions that generate the answer, the last of the prompt first."""
COLUMNS = ("id", "layer", "queries", *KEYS, *(f"num_{name}" for name in KEYS))


def read_allocation(path: Path) -> pd.DataFrame:
    """What `write_allocation` wrote. Raises `InputError` where it is damaged."""
    try:
        table = pd.read_csv(path, dtype={"id": str})
        numbers = table[list(KEYS)].to_numpy(dtype=float)
        table[["layer", *COLUMNS[-4:]]].astype(int)
    except (ValueError, KeyError, pd.errors.ParserError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{path}: not readable ({text}); remove it and evaluate again") from error
    if not len(table) or not (np.abs(numbers.sum(1) - 1) < 1e-2).all():
        raise InputError(f"{path}: shares must add up to 1 in every row; remove it and evaluate again")
    return table
