"""The embedded demo data sets as data sets like any other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from schedule_finder.demo import clip_samples, demo_samples
from schedule_finder.samples.entries import Sample, SampleEntry, Use


class DemoData:
    """The embedded demo data set; calibration and held-out samples come from disjoint seeds."""

    source = "demo"
    _prefix: ClassVar[str] = ""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._drawn: dict[Use, list[Sample]] = {"calibration": [], "held_out": []}
        self._streams: dict[Use, Iterator[Sample]] = {}

    def size(self, use: Use) -> int:
        """Samples are generated: practically unlimited."""
        return 1_000_000

    def entries(self, count: int, held_out: int) -> list[SampleEntry]:
        """The first samples of both streams, which are random already."""
        wanted: list[tuple[Use, int]] = [("calibration", count), ("held_out", held_out)]
        return [
            SampleEntry(
                id=f"{self._prefix}{use}-{self._seed}-{row:06d}", source=self.source, row=row, use=use
            )
            for use, number in wanted
            for row in range(number)
        ]

    def load(self, entry: SampleEntry) -> Sample:
        """Draw the sample; samples are drawn in order and kept."""
        drawn = self._drawn[entry.use]
        stream = self._streams.setdefault(entry.use, self._stream(entry.use))
        while len(drawn) <= entry.row:
            drawn.append(next(stream))
        return drawn[entry.row]

    def _stream(self, use: Use) -> Iterator[Sample]:
        for one in demo_samples(self.size(use), split=use, seed=self._seed):
            yield Sample(one.id, (one.image,), one.question, one.answer, one.question_type, one.regions)


class DemoVideoData(DemoData):
    """The demo's scenes as clips of eight frames."""

    source = "demo-video"
    _prefix = "video-"

    def _stream(self, use: Use) -> Iterator[Sample]:
        for one in clip_samples(self.size(use), split=use, seed=self._seed):
            yield Sample(
                one.id, (), one.question, one.answer, one.question_type, one.regions, videos=(one.frames,)
            )
