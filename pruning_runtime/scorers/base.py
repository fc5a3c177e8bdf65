"""Base classes of scorers, one for each kind of input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

Scope = Literal["sample", "image", "tile"]
Joining = Literal["mean", "add_mean"]


class AttentionScorer(ABC):
    """Scores vision tokens from the text queries' attention at the stage's layer.

    The score is a sum over heads, so attention is computed for a few heads at a time and no ``[heads, length, length]``
    map is made.
    """

    name: ClassVar[str]
    needs_attention: ClassVar[bool] = True
    needs_text: ClassVar[bool] = False
    last_row_only: ClassVar[bool] = False
    """Whether only the row of each sample's last text query is needed."""
    chooses_text: ClassVar[bool] = False
    """Whether `choose_text` says which text queries count."""

    def choose_text(self, tokens: VisionTokens) -> Tensor:
        """The text queries that count, bool ``[groups, text]``, from the inputs of the decoder.

        ``tokens.text`` are the embeddings of all text queries; a group is a row of the batch.
        """
        return tokens.is_text

    @abstractmethod
    def score_heads(self, rows: Tensor, text_queries: Tensor, is_text_query: Tensor) -> Tensor:
        """The contribution of some heads to every key's score, ``[batch, keys]``; higher = keep.

        Args:
            rows: attention probabilities of the text queries, ``[batch, heads, text queries, keys]``, float32,
                softmax over all keys; zero rows where ``is_text_query`` is False.
            text_queries: position of each text query among the keys, ``[batch, text queries]``.
            is_text_query: False for padding entries of ``text_queries``, ``[batch, text queries]``.
        """

    def finish(self, scores: Tensor, vision: Tensor, position: Tensor, keep: Tensor) -> Tensor:
        """The scores that decide, ``[batch, length]``, from the sum of `score_heads` over all heads.

        Args:
            scores: the sum, ``[batch, length]``.
            vision: True at the vision tokens that may be dropped, ``[batch, length]``.
            position: original position of each token, ``[batch, length]``.
            keep: how many of these to keep in each row, ``[batch]``.
        """
        return scores


class PositionScorer(ABC):
    """Scores vision tokens by their positions only; a baseline."""

    name: ClassVar[str]
    needs_attention: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False
    counts_prefills: ClassVar[bool] = False
    """Whether the scores depend on the number of the prefill, so that equal prompts may keep different tokens."""

    @abstractmethod
    def score_positions(self, vision: Tensor, position: Tensor, keep: Tensor, forward: int) -> Tensor:
        """Scores of the tokens that reach a stage, ``[batch, length]`` float32; higher = keep.

        Args:
            vision: True at the vision tokens among them, ``[batch, length]``.
            position: original position of each token, ``[batch, length]``.
            keep: vision tokens to keep in each row, ``[batch]``.
            forward: number of earlier prefills inside the same ``with``.
        """


@dataclass(frozen=True, slots=True)
class TowerTokens:
    """What a vision tower says of the tokens of `VisionTokens`; means over the patches of a token.

    Attributes:
        saliency: by name, see `TowerScorer.saliency`, ``[groups, slots]`` float32; 0 without a patch.
        has_patch: False at padding and at tokens that no patch makes (image newlines), ``[groups, slots]``.
        states: output of the block that feeds the decoder, ``[groups, slots, width]``; None unless needed.
        keys: of that block, mean over heads, ``[groups, slots, head_dim]``; None unless needed.
        row, column: place in the token's image; ``rows``, ``columns``: size of that image in tokens; ``image``: its
            number in the batch. Long ``[groups, slots]``.
        has_cls: whether the tower has a CLS token.
    """

    saliency: dict[str, Tensor]
    has_patch: Tensor
    states: Tensor | None
    keys: Tensor | None
    row: Tensor
    column: Tensor
    rows: Tensor
    columns: Tensor
    image: Tensor
    has_cls: bool


@dataclass(frozen=True, slots=True)
class VisionTokens:
    """The vision tokens that reach a stage, by group: all tokens of a sample, or those of one image.

    Attributes:
        features: hidden states, ``[groups, slots, width]`` float32; zero rows at padding. At stage -1 these are the
            projected image features.
        is_token: False at padding, ``[groups, slots]``; tokens come first.
        keep: tokens to keep, ``[groups]``.
        most_kept: no group keeps more; known on the host.
        groups_per_row: groups of one row of the batch are consecutive.
        text: hidden states of the text tokens, ``[groups, text, width]`` float32; of no tokens unless the scorer
            ``needs_text``. These are the tokens after the sample's last vision token, or all text queries if there
            are none.
        is_text: False at padding, ``[groups, text]``.
        previous: ``features`` before the stage's layer; None unless the scorer ``needs_layer``.
        key_norms, text_key_norms: sum of the absolute entries of each token's key at the stage's layer, over all heads,
            ``[groups, slots]`` and ``[groups, text]``; None unless the scorer ``needs_keys``.
        images: images of each group, ``[groups]``; 1 where a group is an image.
        tower: statistics of the vision tower; None unless the rule is a `TowerScorer`.
    """

    features: Tensor
    is_token: Tensor
    keep: Tensor
    most_kept: int
    groups_per_row: int
    text: Tensor
    is_text: Tensor
    previous: Tensor | None = None
    key_norms: Tensor | None = None
    text_key_norms: Tensor | None = None
    images: Tensor | None = None
    tower: TowerTokens | None = None


class FeatureScorer(ABC):
    """Scores vision tokens by their hidden states at the stage. Works on any backbone and at any layer.

    A rule that chooses tokens one after the other returns falling scores in the order of its choice.

    Attributes:
        scope: "sample" chooses among all tokens of a sample; "image" gives every image a share of the kept tokens in
            proportion to its tokens. An image is a run of vision tokens; single tokens that mark rows do not end it.
    """

    name: ClassVar[str]
    needs_attention: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False
    """Whether the rule reads `VisionTokens.text`; prompts without text are then refused."""
    needs_layer: ClassVar[bool] = False
    """Whether the rule compares states before and after a decoder layer, so that it has no meaning at stage -1."""
    needs_keys: ClassVar[bool] = False
    """Whether the rule reads keys of the stage's layer; implies ``needs_layer``."""
    after_final_norm: ClassVar[bool] = False
    """Whether features and text pass the decoder's final norm first."""
    joins: ClassVar[Joining | None] = None
    """How a kept token changes by the dropped tokens that join it: it becomes the mean of itself and them, or their
    mean is added to it. None: dropped tokens are discarded."""

    def __init__(self, scope: Scope = "sample") -> None:
        if scope not in ("sample", "image"):
            raise TypeError(f"scope must be 'sample' or 'image', found {scope!r}")
        self.scope: Scope = scope

    @abstractmethod
    def score(self, tokens: VisionTokens) -> Tensor:
        """Scores ``[groups, slots]`` float32; the ``tokens.keep`` highest of each group are kept, ties by index.

        Does not read from the device, and no shape depends on data.
        """

    def join(self, tokens: VisionTokens, kept: Tensor) -> Tensor:
        """For every token the slot of the kept token that it joins, or its own slot; long ``[groups, slots]``.

        Called only where ``joins`` is not None. ``kept``: bool ``[groups, slots]``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} states `joins` but not which tokens join"
        )  # pragma: no cover

    @classmethod
    def flops(cls, tokens: float, kept: float, width: float, text: float) -> float:
        """FLOPs of scoring ``tokens`` vision tokens of ``width`` features and ``text`` text tokens; two per multiply-add.

        The default is one product of all pairs, from which the rules here choose.
        """
        return 2 * tokens * tokens * width


class TowerScorer(FeatureScorer):
    """Scores vision tokens by the vision tower: attention, and states or keys of its blocks (`VisionTokens.tower`).

    Needs a model whose tower positions belong to one vision token each; other models are refused by name. Tokens that no
    patch makes (image newlines) rank below all others.

    Attributes:
        scope: also "tile": every image, tile and video frame gets a share in proportion to its tokens; the default.
    """

    saliency: ClassVar[tuple[str, ...]] = ("deep",)
    """Blocks whose attention the rule reads: ``deep``, ``middle``, ``shallow`` (`block_at`). The attention of the CLS
    token where the tower has one, else what a patch receives; always the latter with ``_received`` behind the name."""
    needs_states: ClassVar[bool] = False
    needs_tower_keys: ClassVar[bool] = False
    needs_places: ClassVar[bool] = False
    """Whether the rule reads rows and columns."""

    def __init__(self, scope: Scope = "tile") -> None:
        if scope != "tile":
            super().__init__(scope)
        self.scope = scope

    @classmethod
    def flops(cls, tokens: float, kept: float, width: float, text: float) -> float:
        """None: ranking is not counted. The rules that compare tokens override this."""
        return 0.0
