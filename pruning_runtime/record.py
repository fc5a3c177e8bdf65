"""What a pruned run did: tokens kept, tokens per layer, cache bytes, milliseconds by part."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

_CACHE_STATES = ("keys", "values", "conv_states", "recurrent_states")
"""What a cache's layer holds: attention layers the first two, recurrent ones the others."""


@dataclass(frozen=True)
class StageRecord:
    """One stage of the latest prefill.

    Tensors stay on the model's device until `kept_positions` asks for them, so that recording never
    waits for a GPU.
    """

    layer: int
    keep: tuple[int, ...]
    """Vision tokens kept in each row."""
    _index: Tensor
    _kept_vision: Tensor
    scores: Tensor | None = None
    """``[batch, positions before the stage]``, only where scores were asked for."""

    def kept_positions(self) -> list[list[int]]:
        """Original positions (in the row's unpruned sequence) of the vision tokens kept, per row."""
        index, kept = self._index.cpu(), self._kept_vision.cpu()
        return [row[mask].tolist() for row, mask in zip(index, kept, strict=True)]


@dataclass
class Record:
    """Filled in while a pruned model runs; describes the latest prefill unless it says otherwise.

    Attributes:
        num_layers: decoder layers of the backbone.
        pre_decoder_share: what scoring before the decoder costs, as a share of a layer; 0 where nothing is scored there.
        prefills: prefills since the ``with`` began.
        num_vision: vision tokens of each row.
        num_other: valid tokens of each row that are not vision tokens.
        stages: what each stage did; stages that dropped nothing are not listed.
        fast_prefills: of the prefills, those that ran at static shapes.
        captures: static shapes seen for the first time.
        watch: where `milliseconds` come from.
    """

    num_layers: int
    pre_decoder_share: float = 0.0
    prefills: int = 0
    num_vision: tuple[int, ...] = ()
    num_other: tuple[int, ...] = ()
    stages: list[StageRecord] = field(default_factory=list)
    fast_prefills: int = 0
    captures: int = 0
    watch: Stopwatch | None = field(default=None, repr=False)
    cache: Cache | None = field(default=None, repr=False)

    def begin_prefill(self, num_vision: Sequence[int], num_other: Sequence[int]) -> None:
        """Start describing another prompt."""
        self.prefills += 1
        self.num_vision, self.num_other = tuple(num_vision), tuple(num_other)
        self.stages = []
        self.cache = None

    @property
    def milliseconds(self) -> dict[str, float]:
        """Time by part summed over the ``with``, empty unless timing was asked for.

        ``prefill`` (the decoder, stages included) and of it ``scoring`` and ``dropping``; ``decode`` (the decoder on
        generated tokens). Reading it waits for the device; the run itself never does.
        """
        return {} if self.watch is None else self.watch.sums()

    @property
    def vision_tokens_per_layer(self) -> list[list[int]]:
        """Vision tokens that each layer computed, ``[layers][rows]``."""
        counts = []
        for layer in range(self.num_layers):
            keep = self.num_vision
            for stage in self.stages:
                if stage.layer < layer:
                    keep = stage.keep
            counts.append(list(keep))
        return counts

    @property
    def tokens_per_layer(self) -> list[list[int]]:
        """All valid tokens that each layer computed, ``[layers][rows]``."""
        return [
            [vision + other for vision, other in zip(row_counts, self.num_other, strict=True)]
            for row_counts in self.vision_tokens_per_layer
        ]

    @property
    def pre_decoder_cost(self) -> float:
        """What scoring before the decoder took of layer 0, as a share of a layer; 0.0 where nothing was."""
        return self.pre_decoder_share if self.stages and self.stages[0].layer == -1 else 0.0

    @property
    def processed(self) -> float:
        """Vision tokens computed, mean over layers, as a fraction of all; 1.0 before any prefill.

        Where tokens were scored before the decoder, what that took of layer 0 is counted too.
        """
        total = sum(self.num_vision) * self.num_layers
        computed = sum(map(sum, self.vision_tokens_per_layer))
        return computed / total + self.pre_decoder_cost / self.num_layers if total else 1.0

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache's key and value tensors as they are now; 0 without a cache."""
        layers = [] if self.cache is None else self.cache.layers
        states = [getattr(layer, name, None) for layer in layers for name in _CACHE_STATES]
        return sum(state.nbytes for state in states if isinstance(state, Tensor))

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


class Stopwatch:
    """Sums milliseconds by part; on CUDA by events, read only when the sums are asked for."""

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self._enabled = enabled
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._sums: dict[str, float] = defaultdict(float)
        self._open: dict[str, Any] = {}

    def start(self, part: str) -> None:
        """Begin timing ``part``."""
        if self._enabled:
            self._open[part] = self._now()

    def stop(self, part: str) -> None:
        """End timing ``part``; without a `start` nothing happens."""
        if (begun := self._open.pop(part, None)) is not None:
            self._spans.append((part, begun, self._now()))

    @contextmanager
    def part(self, part: str) -> Iterator[None]:
        """Time the body of a ``with`` as ``part``."""
        self.start(part)
        try:
            yield
        finally:
            self.stop(part)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time nothing in the body of a ``with``."""
        enabled, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = enabled

    def sums(self) -> dict[str, float]:
        """Milliseconds by part so far; waits for the device."""
        for part, begun, ended in self._spans:
            if self._cuda:
                ended.synchronize()
            self._sums[part] += begun.elapsed_time(ended) if self._cuda else 1e3 * (ended - begun)
        self._spans.clear()
        return dict(self._sums)

    def _now(self) -> Any:
        """A moment: seconds, or an event on the device's stream."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
