"""The embedded demo data set as a data set like any other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from schedule_finder.demo import demo_samples
from schedule_finder.samples.entries import Sample, SampleEntry, Use


class DemoData:
    """The embedded demo data set; calibration and held-out samples come from disjoint seeds."""

    source = "demo"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._drawn: dict[Use, list[Sample]] = {"calibration": [], "held_out": []}
        self._streams: dict[Use, Iterator[Any]] = {}

    def size(self, use: Use) -> int:
        """Samples are generated: practically unlimited."""
        return 1_000_000

    def entries(self, count: int, held_out: int) -> list[SampleEntry]:
        """The first samples of both streams, which are random already."""
        wanted: list[tuple[Use, int]] = [("calibration", count), ("held_out", held_out)]
        return [
            SampleEntry(id=f"{use}-{self._seed}-{row:06d}", source=self.source, row=row, use=use)
            for use, number in wanted
            for row in range(number)
        ]

    def load(self, entry: SampleEntry) -> Sample:
        """Draw the sample; samples are drawn in order and kept."""
        drawn = self._drawn[entry.use]
        stream = self._streams.setdefault(
            entry.use, demo_samples(self.size(entry.use), split=entry.use, seed=self._seed)
        )
        while len(drawn) <= entry.row:
            sample = next(stream)
            drawn.append(
                Sample(
                    sample.id,
                    (sample.image,),
                    sample.question,
                    sample.answer,
                    sample.question_type,
                    sample.regions,
                )
            )
        return drawn[entry.row]
