"""VScan's rule for the vision tower: a local scan window by window, and a global scan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import Scope, TowerScorer, VisionTokens
from pruning_runtime.scorers.similarity import cosine, nearest, ranks

if TYPE_CHECKING:
    from torch import Tensor

_WINDOW_WITH_CLS, _WINDOW = 6, 4
"""Published: 6 x 6 on CLIP (LLaVA), 4 x 4 on towers without CLS (Qwen2.5-VL)."""


class VScan(TowerScorer):
    """Local and global scan, then merging (VScan's tower stage, arXiv 2505.22654); reads no text.

    Of ``k`` tokens, the local scan takes up to ``k // 2``: the most salient in the shallow block of every window of
    ``window`` x ``window`` tokens, equally many of each. With CLS this number is rounded down, without it is rounded up
    and the most salient of these count. The global scan fills up: the most salient in the deep block. Every other token
    joins the kept token of highest cosine, which becomes the mean of all.

    Rows and columns that fill no window belong to the last one. The publication keeps fewer than ``k`` where a half is no
    multiple of the windows; here the global scan fills up. It adds a stage inside the decoder (``last_token``).
    """

    name = "vscan"
    saliency = ("shallow", "deep")
    needs_places = True
    joins = "mean"

    def __init__(self, window: int | None = None, scope: Scope = "tile") -> None:
        super().__init__(scope)
        if window is not None and window < 1:
            raise TypeError(f"window must be at least 1, found {window!r}")
        self.window = window

    def score(self, tokens: VisionTokens) -> Tensor:
        tower = tokens.tower
        assert tower is not None
        slots = tokens.is_token.shape[1]
        half = (tokens.keep // 2)[:, None]
        rank, windows = self._rank_in_window(tokens)
        each = half // windows if tower.has_cls else (half + windows - 1) // windows
        is_candidate = tower.has_patch & (rank < each)
        best = ranks(tower.saliency["shallow"], is_candidate)
        is_local = is_candidate & (best < half)
        deep = ranks(tower.saliency["deep"], tower.has_patch)
        return (is_local * 2 * slots - deep).float()

    def join(self, tokens: VisionTokens, kept: Tensor) -> Tensor:
        return nearest(cosine(tokens.features, tokens.features), kept)

    def _rank_in_window(self, tokens: VisionTokens) -> tuple[Tensor, Tensor]:
        """Rank of every token in its window by shallow saliency, and windows of each group, at least 1."""
        import torch

        tower = tokens.tower
        assert tower is not None
        edge = self.window or (_WINDOW_WITH_CLS if tower.has_cls else _WINDOW)

        def part(place: Tensor, size: Tensor) -> Tensor:
            return (place // edge).minimum((size // edge - 1).clamp(min=0))

        # Any number that differs between windows: rows and columns of a grid are far below 2 ** 15.
        window = (tower.image * 2**15 + part(tower.row, tower.rows)) * 2**15 + part(
            tower.column, tower.columns
        )
        window = window.masked_fill(~tower.has_patch, 2**62)
        order = ranks(tower.saliency["shallow"], tower.has_patch).argsort(1)
        window, by_window = window.gather(1, order).sort(dim=1, stable=True)
        starts = torch.ones_like(window, dtype=torch.bool)
        starts[:, 1:] = window[:, 1:] != window[:, :-1]
        position = torch.arange(window.shape[1], device=window.device)
        first = torch.where(starts, position, 0).cummax(1).values
        rank = torch.zeros_like(window).scatter_(1, order.gather(1, by_window), position - first)
        windows = (starts & (window < 2**62)).sum(1, keepdim=True).clamp(min=1)
        return rank, windows
