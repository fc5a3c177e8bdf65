"""MMTok's rule: tokens that cover the text and all other vision tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import FeatureScorer, Scope, VisionTokens
from pruning_runtime.scorers.coverage import Coverage
from pruning_runtime.scorers.similarity import cosine, greedy_scores

if TYPE_CHECKING:
    from torch import Tensor


class MMTok(FeatureScorer):
    """Greedy maximum coverage of text and vision tokens (MMTok, arXiv 2508.18264).

    A row per text token and a row per vision token say how well each vision token stands for it: softmax over the
    vision tokens of the cosine, at temperatures ``text_temperature`` and ``vision_temperature``, divided by the number of
    rows of its kind; vision rows count ``alpha``. The token that adds most to the maxima of all rows is chosen next.

    The publication compares vision tokens before the projector; here the projected features are compared, which every
    backbone has.
    """

    name = "mmtok"
    needs_text = True

    def __init__(
        self,
        text_temperature: float = 0.02,
        vision_temperature: float = 0.2,
        alpha: float = 0.5,
        scope: Scope = "image",
    ) -> None:
        super().__init__(scope)
        if min(text_temperature, vision_temperature) <= 0:
            raise TypeError("text_temperature and vision_temperature must be above 0")
        self.text_temperature, self.vision_temperature, self.alpha = (
            text_temperature,
            vision_temperature,
            alpha,
        )

    def score(self, tokens: VisionTokens) -> Tensor:
        import torch

        from_text = _shares(tokens.text, tokens, tokens.is_text, self.text_temperature)
        from_vision = _shares(tokens.features, tokens, tokens.is_token, self.vision_temperature)
        # [groups, vision tokens, rows]: a chosen token's row is then contiguous.
        shares = torch.cat([from_text, self.alpha * from_vision], 1).transpose(1, 2).contiguous()
        cover = Coverage(shares)
        return greedy_scores(tokens.is_token, tokens.most_kept, cover.gains, cover.choose)


def _shares(rows: Tensor, tokens: VisionTokens, is_row: Tensor, temperature: float) -> Tensor:
    """``[groups, rows, vision tokens]``: softmax over the vision tokens, divided by the number of rows."""
    logits = cosine(rows, tokens.features) / temperature
    shares = logits.masked_fill(~tokens.is_token[:, None], float("-inf")).softmax(2)
    shares = shares.nan_to_num(0.0) * is_row[..., None]  # a group without tokens has no softmax
    return shares / is_row.sum(1).clamp(min=1)[:, None, None]
