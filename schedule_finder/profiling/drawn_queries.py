"""A sample of the text queries of a long text, so that profiling costs the same for any text."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_queries(text_queries: Tensor, most: int) -> Tensor:
    """At most ``most`` text queries of each row: one drawn from each of ``most`` stretches of equal length, and the last.

    What is drawn depends on the number of text queries and on ``most`` alone, so it is the same in every batch. Means
    over the drawn queries estimate means over all of them without bias (stratified sampling), apart from the last
    stretch, which gives its last query: the rule of the last token needs it. With ``s`` the standard deviation of a
    value over the text queries, the standard error of its estimated mean is at most ``s / sqrt(most)``, and less where
    neighbouring queries are alike.

    Args:
        text_queries: bool ``[rows, length]``, on the host.
        most: at least 1.

    Returns:
        bool ``[rows, length]``.
    """
    drawn = text_queries.clone()
    for row in range(len(text_queries)):
        positions = text_queries[row].nonzero().squeeze(1)
        count = len(positions)
        if count > most:
            bounds = torch.arange(most + 1, dtype=torch.float64) * (count / most)
            first, end = bounds[:-1].ceil().long(), bounds[1:].ceil().long()
            at = torch.rand(most, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
            picked = first + (at * (end - first)).long()
            picked[-1] = count - 1
            drawn[row] = False
            drawn[row, positions[picked]] = True
    return drawn
