"""Interface of the engines: chunks of samples in, batch results out; and the limits of a batch.

Samples go through an engine in *chunks*, fixed slices of the run's list of samples. The batches of a chunk depend
on its own samples alone, not on what is finished, so a repeated chunk makes the same batches: padding and rounding
are the same after any interruption and on any worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pruning_runtime.geometry import DecoderShape
from schedule_finder.profiling.fields import MOST_QUERIES
from schedule_finder.samples import SampleEntry

if TYPE_CHECKING:
    import torch

    from schedule_finder.models.loading import LoadedBackbone
    from schedule_finder.profiling.fields import ProfileRow

CHUNK_SIZE = 64
"""Samples in a chunk: a compromise between grouping by length and work that an interruption repeats."""

MOST_TOKENS, MOST_TOKENS_ON_CPU = 16384, 1024
"""Tokens in a batch where the user gives no number. On a CPU, the states of a layer then stay near its cache: the demo's
profile takes 22 % less time than in batches of 2700 tokens, that of the photo backbone 10 %."""

Report = Callable[[str], None]
"""Called with a line for the user about a problem that was handled."""


@dataclass(frozen=True)
class BatchLimits:
    """Limits of a batch.

    Attributes:
        samples: samples.
        tokens: tokens with padding, which determine the memory of a forward pass; None: see `tokens_on`.
        text_queries: text queries of a sample whose attention is computed, see `draw_queries`; None: all.
    """

    samples: int = 32
    tokens: int | None = None
    text_queries: int | None = MOST_QUERIES

    def tokens_on(self, device: torch.device) -> int:
        """Most tokens in a batch on ``device``; one sample may have more."""
        return self.tokens or (MOST_TOKENS_ON_CPU if device.type == "cpu" else MOST_TOKENS)


@dataclass(frozen=True)
class SampleChunk:
    """A fixed slice of the list of samples, and the ids in it that are not finished."""

    number: int
    entries: tuple[SampleEntry, ...]
    wanted: frozenset[str]


@dataclass(frozen=True)
class Outcome:
    """The new entry of one sample, and its row where it could be profiled."""

    entry: SampleEntry
    row: ProfileRow | None = None


@dataclass(frozen=True)
class BatchResult:
    """Outcomes of some wanted samples of one chunk; ``last`` ends the chunk."""

    outcomes: list[Outcome] = field(default_factory=list)
    last: bool = False


class Engine(Protocol):
    """Runs chunks through one backbone, or copies of it. Used inside a ``with``, which ends its workers.

    Attributes:
        meta: content of the profile's ``meta.json``.
        loaded: the backbone, where it is in this process.
        place: device or workers, for display.
    """

    meta: dict[str, Any]
    loaded: LoadedBackbone | None
    place: str

    def __enter__(self) -> Engine: ...

    def __exit__(self, *error: object) -> None: ...

    def profile(self, chunks: Iterable[SampleChunk], report: Report) -> Iterator[BatchResult]:
        """Every wanted sample of every chunk once, chunks in any order.

        No further chunk is started once the caller stops iterating.
        """


def describe_backbone(loaded: LoadedBackbone, limits: BatchLimits) -> dict[str, Any]:
    """Meta of a profile: equal for all profiles that can be merged."""
    from schedule_finder.profiling.capture import layers_to_profile

    shape = loaded.backbone.shape
    layers, left_out = layers_to_profile(loaded.backbone)
    return {
        "backbone": loaded.identity.model_dump(),
        "shape": {name: getattr(shape, name) for name in DecoderShape.__slots__},
        "layers": layers,
        "left_out": {str(layer): reason for layer, reason in left_out.items()},
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "prompt_digest": loaded.prompt_digest,
        "text_queries": limits.text_queries,
    }


def cut_chunks(
    entries: Sequence[SampleEntry], pending: frozenset[str], size: int = CHUNK_SIZE
) -> list[SampleChunk]:
    """The chunks of a list of samples that hold pending ones."""
    chunks = []
    for number, first in enumerate(range(0, len(entries), size)):
        some = tuple(entries[first : first + size])
        if wanted := frozenset(entry.id for entry in some) & pending:
            chunks.append(SampleChunk(number, some, wanted))
    return chunks
