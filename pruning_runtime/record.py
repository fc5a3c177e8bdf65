"""What a pruned run did: tokens kept, tokens per layer, cache bytes, milliseconds by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import Cache

from pruning_runtime.costs import kept_per_layer
from pruning_runtime.display import html_table, percent, stage_name
from pruning_runtime.timing import Stopwatch

_CACHE_STATES = ("keys", "values", "conv_states", "recurrent_states")
"""Tensors of a cache layer: the first two of attention layers, the others of recurrent layers."""


@dataclass(frozen=True)
class StageRecord:
    """One stage of the latest prefill.

    Tensors stay on the model's device until `kept_positions` copies them, so that recording does not wait for a GPU.
    """

    layer: int
    keep: tuple[int, ...]
    """Vision tokens kept in each row."""
    _index: Tensor
    _kept_vision: Tensor
    scores: Tensor | None = None
    """``[batch, positions before the stage]``; None unless scores were requested."""
    scorer: str | None = None
    """Name of the scorer that ranked the tokens of this stage."""

    def kept_positions(self) -> list[list[int]]:
        """Original positions (in the row's unpruned sequence) of the vision tokens kept, per row."""
        index, kept = self._index.cpu(), self._kept_vision.cpu()
        return [row[mask].tolist() for row, mask in zip(index, kept, strict=True)]


@dataclass(repr=False)
class Record:
    """Filled in while a pruned model runs. Describes the latest prefill unless stated otherwise.

    Attributes:
        num_layers: decoder layers of the backbone.
        pre_decoder_share: cost of scoring before the decoder as a share of a layer; 0 without such scoring.
        feature_share: the same of scoring with hidden states, for (vision tokens, other tokens) of a prompt.
        prefills: prefills since the ``with`` began.
        num_vision: vision tokens of each row.
        num_other: valid tokens of each row that are not vision tokens.
        stages: one `StageRecord` per stage that dropped tokens.
        fast_prefills: prefills that ran at static shapes.
        captures: static shapes that were new.
        watch: source of `milliseconds`.
        cache: of the latest prefill.
    """

    num_layers: int
    pre_decoder_share: float = 0.0
    feature_share: Callable[[float, float], float] | None = field(default=None, repr=False)
    prefills: int = 0
    num_vision: tuple[int, ...] = ()
    num_other: tuple[int, ...] = ()
    stages: list[StageRecord] = field(default_factory=list)
    fast_prefills: int = 0
    captures: int = 0
    watch: Stopwatch | None = field(default=None, repr=False)
    cache: Cache | None = field(default=None, repr=False)

    def begin_prefill(self, num_vision: Sequence[int], num_other: Sequence[int]) -> None:
        """Describe another prompt from now on."""
        self.prefills += 1
        self.num_vision, self.num_other = tuple(num_vision), tuple(num_other)
        self.stages = []
        self.cache = None

    @property
    def milliseconds(self) -> dict[str, float]:
        """Milliseconds by part, summed over the ``with``; empty unless ``timing`` was requested.

        ``prefill``: the decoder with its stages; ``scoring`` and ``dropping``: parts of it; ``decode``: the decoder on
        generated tokens. Reading this property waits for the device; the run itself does not.
        """
        return {} if self.watch is None else self.watch.sums()

    @property
    def vision_tokens_per_layer(self) -> list[list[int]]:
        """Vision tokens that each layer computed, ``[layers][rows]``."""
        kept = [(stage.layer, stage.keep) for stage in self.stages]
        return [list(row) for row in kept_per_layer(kept, self.num_vision, self.num_layers)]

    @property
    def tokens_per_layer(self) -> list[list[int]]:
        """All valid tokens that each layer computed, ``[layers][rows]``."""
        return [
            [vision + other for vision, other in zip(row_counts, self.num_other, strict=True)]
            for row_counts in self.vision_tokens_per_layer
        ]

    @property
    def pre_decoder_cost(self) -> float:
        """Cost of scoring before the decoder as a share of a layer; 0.0 if the latest prefill did not do it."""
        return self.pre_decoder_share if self.stages and self.stages[0].layer == -1 else 0.0

    @property
    def processed(self) -> float:
        """Vision tokens computed, mean over layers, as a fraction of all; 1.0 before any prefill.

        Includes `pre_decoder_cost` and `feature_cost`.
        """
        total = sum(self.num_vision) * self.num_layers
        computed = sum(map(sum, self.vision_tokens_per_layer))
        scoring = (self.pre_decoder_cost + self.feature_cost) / self.num_layers
        return computed / total + scoring if total else 1.0

    @property
    def feature_cost(self) -> float:
        """Cost of scoring with hidden states as a share of a layer, mean over rows; 0.0 without such scoring."""
        if self.feature_share is None or not self.stages:
            return 0.0
        pairs = zip(self.num_vision, self.num_other, strict=True)
        return sum(self.feature_share(*pair) for pair in pairs) / len(self.num_vision)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache's tensors now; 0 without a cache."""
        layers = [] if self.cache is None else self.cache.layers
        states = [getattr(layer, name, None) for layer in layers for name in _CACHE_STATES]
        return sum(state.nbytes for state in states if isinstance(state, Tensor))

    def __repr__(self) -> str:
        """One line."""
        if not self.prefills:
            return "<Record: no prefill yet>"
        rows, tokens = len(self.num_vision), sum(self.num_vision)
        return f"<Record: {rows} row(s), {tokens} vision tokens, {percent(self.processed)} processed>"

    def _repr_html_(self) -> str:
        """A table of the latest prefill, for notebooks."""
        if not self.prefills:
            return html_table("Record", ("no prefill yet",), ())
        kept = [(stage_name(stage.layer), ", ".join(map(str, stage.keep))) for stage in self.stages]
        rows = [("before pruning", ", ".join(map(str, self.num_vision))), *kept]
        note = f"{percent(self.processed)} of the vision tokens processed; cache {self.cache_bytes / 2**20:.2f} MiB"
        return html_table("Record of the latest prefill", ("Stage", "Vision tokens by row"), rows, note)

    def __str__(self) -> str:
        if not self.prefills:
            return "no prefill yet"
        lines = [
            f"{len(self.num_vision)} row(s), {sum(self.num_vision)} vision tokens; "
            f"{100 * self.processed:.1f} % of them computed per layer on average; "
            f"cache {self.cache_bytes / 2**20:.2f} MiB"
        ]
        lines += [
            f"  after layer {stage.layer}: kept {', '.join(map(str, stage.keep))}" for stage in self.stages
        ]
        lines += [f"  {part}: {value:.2f} ms" for part, value in self.milliseconds.items()]
        return "\n".join(lines)
