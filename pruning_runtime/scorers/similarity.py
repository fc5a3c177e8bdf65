"""What several feature scorers share: cosine similarities and the bookkeeping of greedy choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def unit_rows(features: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay zero, so that their cosine with any row is 0."""
    length = features.norm(dim=-1, keepdim=True)
    return features / length.masked_fill(length == 0, 1.0)


def cosine(features: Tensor, others: Tensor) -> Tensor:
    """Cosine of every row of ``features`` with every row of ``others``, ``[groups, rows, other rows]``."""
    return unit_rows(features) @ unit_rows(others).transpose(1, 2)


def greedy_scores(
    is_token: Tensor, steps: int, gains: Callable[[], Tensor], choose: Callable[[Tensor], None]
) -> Tensor:
    """Scores that fall in the order in which a greedy rule chooses tokens, ``[groups, slots]`` float32.

    Runs a fixed number of steps without reading from the device. A token is chosen once; ties go to the lower slot.

    Args:
        is_token: False at padding, ``[groups, slots]``.
        steps: tokens to choose.
        gains: value of choosing each token now, ``[groups, slots]``; the highest is chosen. No NaN.
        choose: called with the chosen slot of each group, ``[groups, 1]``, after each step.
    """
    import torch  # here, so that reading a schedule does not import it

    lowest = torch.finfo(torch.float32).min
    scores = torch.full(is_token.shape, lowest, device=is_token.device)
    is_open = is_token.clone()
    for step in range(min(steps, is_token.shape[1])):
        # In a group without a token left, any slot is found again and must keep its score.
        slot = gains().clamp(min=lowest).masked_fill(~is_open, float("-inf")).argmax(1, keepdim=True)
        scores.scatter_(1, slot, torch.where(is_open.gather(1, slot), -float(step), scores.gather(1, slot)))
        is_open.scatter_(1, slot, False)
        choose(slot)
    return scores


def ranks(values: Tensor, is_token: Tensor) -> Tensor:
    """Rank of every slot among its group's tokens, 0 for the highest value; ties by index, padding behind all tokens.

    ``values``, ``is_token``: ``[groups, slots]``.
    """
    ordered = values.masked_fill(~is_token, float("-inf")).argsort(dim=1, descending=True, stable=True)
    return ordered.argsort(1)


def nearest(similarity: Tensor, candidates: Tensor) -> Tensor:
    """The candidate slot of highest similarity, or the own slot where there is none, long ``[groups, slots]``.

    Args:
        similarity: of every token with every token, ``[groups, slots, slots]``.
        candidates: bool ``[groups, slots]``.
    """
    import torch

    best = similarity.masked_fill(~candidates[:, None], float("-inf")).argmax(2)
    own = torch.arange(best.shape[1], device=best.device).expand_as(best)
    return torch.where(candidates.any(1, keepdim=True), best, own)
