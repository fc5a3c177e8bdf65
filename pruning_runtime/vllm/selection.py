"""Which tokens of one image or video are kept: the runtime's scorers and selection on its embeddings alone."""

from __future__ import annotations

import torch
from torch import Tensor

from pruning_runtime.scorers import AttentionScorer, PositionScorer, Scorer, VisionTokens
from pruning_runtime.selection import select_kept


def kept_indices(features: Tensor, keep: int, scorer: Scorer, protected: Tensor | None = None) -> Tensor:
    """Indices of the kept tokens in rising order, long ``[keep]``.

    Args:
        features: projected features of one image or video, ``[tokens, width]``.
        keep: tokens to keep, from 1 to all.
        scorer: one that `why_scorer_not_served` does not refuse.
        protected: image-newline tokens, which rank above all others, bool ``[tokens]``; None: none are protected.
    """
    number, device = len(features), features.device
    if keep >= number:
        return torch.arange(number, device=device)
    everything = torch.ones(1, number, dtype=torch.bool, device=device)
    open_tokens, of_open = everything, torch.full((1,), keep, device=device)
    if protected is not None:
        open_tokens = ~protected[None]
        of_open = (of_open - protected.sum()).clamp(min=0)
    scores = _scores(features, open_tokens, of_open, keep, scorer)
    total = torch.full((1,), keep, device=device)
    index, _ = select_kept(
        scores, everything, everything, total, keep, None if protected is None else protected[None]
    )
    return index[0]


def newline_mask(features: Tensor, newline: Tensor) -> Tensor:
    """True at the tokens of ``features`` (``[tokens, width]``) that are the learned vector ``newline`` itself."""
    return (features == newline.to(features.device, features.dtype)).all(-1)


def _scores(features: Tensor, tokens: Tensor, keep: Tensor, most_kept: int, scorer: Scorer) -> Tensor:
    """Scores of all tokens, ``[1, tokens]``; those outside ``tokens`` have no meaning."""
    position = torch.arange(len(features), device=features.device)[None]
    if isinstance(scorer, PositionScorer):
        return scorer.score_positions(tokens, position, keep, 0)
    assert not isinstance(scorer, AttentionScorer)
    # A rule expects its tokens first; the order of the others does not matter.
    order = torch.argsort((~tokens).long(), dim=1, stable=True)
    is_token = tokens.gather(1, order)
    given = VisionTokens(
        features=features[order[0]].float()[None] * is_token[..., None],
        is_token=is_token,
        keep=keep,
        most_kept=most_kept,
        groups_per_row=1,
        text=features.new_zeros(1, 1, features.shape[1], dtype=torch.float32),
        is_text=torch.zeros(1, 1, dtype=torch.bool, device=features.device),
        images=torch.ones(1, dtype=torch.long, device=features.device),
    )
    with torch.autocast(features.device.type, enabled=False):
        scores = scorer.score(given)
    return torch.empty_like(scores).scatter_(1, order, scores)
