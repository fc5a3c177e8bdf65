"""Base classes of scorers, one for each kind of input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class AttentionScorer(ABC):
    """Scores vision tokens from the text queries' attention at the stage's layer.

    The score is a sum over heads, so attention is computed for a few heads at a time and no ``[heads, length, length]``
    map is made.
    """

    name: ClassVar[str]
    needs_attention: ClassVar[bool] = True
    last_row_only: ClassVar[bool] = False
    """Whether only the row of each sample's last text query is needed."""

    @abstractmethod
    def score_heads(self, rows: Tensor, text_queries: Tensor, is_text_query: Tensor) -> Tensor:
        """The contribution of some heads to every key's score, ``[batch, keys]``; higher = keep.

        Args:
            rows: attention probabilities of the text queries, ``[batch, heads, text queries, keys]``, float32,
                softmax over all keys; zero rows where ``is_text_query`` is False.
            text_queries: position of each text query among the keys, ``[batch, text queries]``.
            is_text_query: False for padding entries of ``text_queries``, ``[batch, text queries]``.
        """


class PositionScorer(ABC):
    """Scores vision tokens by their positions only; a baseline."""

    name: ClassVar[str]
    needs_attention: ClassVar[bool] = False

    @abstractmethod
    def score_positions(self, vision: Tensor, position: Tensor, keep: Tensor, forward: int) -> Tensor:
        """Scores of the tokens that reach a stage, ``[batch, length]`` float32; higher = keep.

        Args:
            vision: True at the vision tokens among them, ``[batch, length]``.
            position: original position of each token, ``[batch, length]``.
            keep: vision tokens to keep in each row, ``[batch]``.
            forward: number of earlier prefills inside the same ``with``.
        """
