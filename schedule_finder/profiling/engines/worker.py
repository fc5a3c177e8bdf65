"""One copy of a backbone that turns chunks of samples into profile rows, for every engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from pruning_runtime import UnsupportedBackbone
from schedule_finder.errors import InputError
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.profiling.capture import ProfileRow, profile_batch
from schedule_finder.profiling.engines.base import BatchLimits, Outcome, Report, SampleChunk
from schedule_finder.samples import BadSample, DataSet, Sample, SampleEntry, describe

HELD_BYTES = 512 * 2**20
"""Decoded images of a chunk kept in memory until their batch runs; others are loaded again."""


class Worker:
    """Profiles chunks with one backbone.

    A sample that cannot be used (unreadable, refused by the processor, NaN in its attention, too large for the
    memory even alone) is returned without a row, as skipped with the reason. When memory runs out, the batch is
    halved, and later batches have at most as many tokens as a half; from then on batches, and with them rounding,
    depend on the machine.
    """

    def __init__(self, loaded: LoadedBackbone, data: DataSet, limits: BatchLimits, report: Report) -> None:
        self.loaded = loaded
        self._data = data
        self._report = report
        self._most_samples = limits.samples
        self._most_tokens = limits.tokens_on(loaded.device)
        self._most_queries = limits.text_queries
        self._longest = 0  # tokens per row of the current batch
        self._held: dict[str, Sample] = {}

    def profile(self, chunk: SampleChunk) -> Iterator[list[Outcome]]:
        """Outcomes of the chunk's wanted samples, batch by batch."""
        self._held.clear()
        unusable, order = self._load(chunk)
        yield [outcome for outcome in unusable if outcome.entry.id in chunk.wanted]
        # The first sample has the most pixels, so its length bounds the others, in most cases. A batch that turns
        # out too large is halved.
        length = self._length_of(order[0]) if order else 0
        while order:
            count = min(self._most_samples, max(1, self._most_tokens // max(1, length)))
            batch, order = order[:count], order[count:]
            self._longest = 0
            yield list(self._run(batch, chunk.wanted))
            length = self._longest or length
            for entry in batch:
                self._held.pop(entry.id, None)

    def _load(self, chunk: SampleChunk) -> tuple[list[Outcome], list[SampleEntry]]:
        """Skipped samples, and the entries of the others, described, large ones first."""
        unusable, usable, room = [], [], HELD_BYTES
        for entry in chunk.entries:
            try:
                sample = self._data.load(entry)
            except BadSample as error:
                unusable.append(_skipped(entry, str(error)))
                continue
            frames = [*sample.images, *(frame for video in sample.videos for frame in video)]
            pixels = sum(image.width * image.height for image in frames)
            usable.append((-pixels, -len(sample.question), describe(entry, sample)))
            if (room := room - 3 * pixels) > 0:
                self._held[entry.id] = sample
        usable.sort(key=lambda item: item[:2])
        return unusable, [entry for *_, entry in usable]

    def _length_of(self, entry: SampleEntry) -> int:
        """Tokens of one sample, or 0 where the processor raises; its batch then reports the reason."""
        try:
            return self.loaded.inputs([self._sample(entry)])["input_ids"].shape[1]
        except (InputError, UnsupportedBackbone):
            raise
        except Exception:
            return 0

    def _run(self, batch: Sequence[SampleEntry], wanted: frozenset[str]) -> Iterator[Outcome]:
        """Run a batch, in halves where it is too large or one of its samples fails."""
        rows, tokens, reason, out_of_memory = None, 0, "", False
        try:
            inputs = self.loaded.inputs([self._sample(entry) for entry in batch])
            tokens = inputs["input_ids"].numel()
            self._longest = max(self._longest, inputs["input_ids"].shape[1])
            if tokens <= self._most_tokens or len(batch) == 1:
                if wanted.isdisjoint(entry.id for entry in batch):
                    return
                rows = profile_batch(self.loaded.backbone, inputs, self._most_queries)
        except (InputError, UnsupportedBackbone, torch.AcceleratorError):
            raise  # not about one sample
        except Exception as error:  # processors and models raise errors of any type
            reason = " ".join(str(error).split()) or type(error).__name__
            out_of_memory = is_out_of_memory(error)
        if rows is not None:
            outcomes = zip(batch, rows, strict=True)
            yield from (_outcome(entry, row) for entry, row in outcomes if entry.id in wanted)
            return
        # Outside the `except`, whose error keeps the tensors of the failed attempt alive.
        if out_of_memory:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(batch) > 1 and 0 < tokens // 2 < self._most_tokens:
                self._most_tokens = tokens // 2
                self._report(
                    f"out of memory with {tokens} tokens; batches hold {self._most_tokens} from now on"
                )
            reason = f"out of memory with this sample alone ({tokens} tokens)"
        if len(batch) == 1:
            yield from (_skipped(entry, reason) for entry in batch if entry.id in wanted)
            return
        half = len(batch) // 2
        yield from self._run(batch[:half], wanted)
        yield from self._run(batch[half:], wanted)

    def _sample(self, entry: SampleEntry) -> Sample:
        return self._held.get(entry.id) or self._data.load(entry)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the host; PyTorch has no one type for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _outcome(entry: SampleEntry, row: ProfileRow) -> Outcome:
    if all(np.isfinite(values).all() for values in (*row.scores.values(), *row.curves.values())):
        return Outcome(replace(entry, status="done"), row)
    return _skipped(entry, "the model's attention is not finite (NaN or infinite)")


def _skipped(entry: SampleEntry, reason: str) -> Outcome:
    return Outcome(replace(entry, status="skipped", reason=reason))
