"""What a scorer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class AttentionScorer(ABC):
    """Scores vision tokens from the text queries' attention at the stage's layer.

    A subclass says which rows it reads and what one group of heads adds. Its score is the sum over
    all heads, so that attention can be computed a few heads at a time and no ``[heads, length,
    length]`` map ever exists.
    """

    name: ClassVar[str]
    needs_attention: ClassVar[bool] = True
    last_row_only: ClassVar[bool] = False
    """True: only the row of each sample's last text query is computed."""

    @abstractmethod
    def score_heads(self, rows: Tensor, text_queries: Tensor, is_text_query: Tensor) -> Tensor:
        """What these heads add to every key's score, ``[batch, keys]``; higher = keep.

        Args:
            rows: attention probabilities of the text queries, ``[batch, heads, text queries, keys]``, float32,
                softmax over all keys; all-zero rows where ``is_text_query`` is False.
            text_queries: position of each text query among the keys, ``[batch, text queries]``.
            is_text_query: False for padding entries of ``text_queries``, ``[batch, text queries]``.
        """


class PositionScorer(ABC):
    """Scores vision tokens by where they stand; a baseline, and usable before the decoder."""

    name: ClassVar[str]
    needs_attention: ClassVar[bool] = False

    @abstractmethod
    def score_positions(self, vision: Tensor, position: Tensor, keep: Tensor, forward: int) -> Tensor:
        """Scores of the tokens that reach a stage, ``[batch, length]`` float32; higher = keep.

        Args:
            vision: True at the vision tokens among them, ``[batch, length]``.
            position: each token's place in the unpruned sequence, ``[batch, length]``.
            keep: vision tokens that will stay in each row, ``[batch]``.
            forward: how many prefills came before this one inside the same ``with``.
        """
