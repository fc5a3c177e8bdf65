"""The seeded choice of calibration and held-out rows, in equal shares over the data sets of a mixture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from schedule_finder.errors import InputError
from schedule_finder.samples.demo import DemoData
from schedule_finder.samples.entries import DataSet, Sample, SampleEntry, Use
from schedule_finder.samples.photo import PhotoData
from schedule_finder.samples.tables import TableData

LOOKED_AT = 20
"""Rows that are looked at for each held-out sample, at least 2000, before a data set is said to have no more that differ."""


class Mixture:
    """Several data sets as one. Raises `InputError` where one is given twice."""

    def __init__(self, parts: Sequence[DataSet]) -> None:
        self.parts = {part.source: part for part in parts}
        if len(self.parts) < len(parts):
            names = [part.source for part in parts]
            raise InputError(f"--dataset: {next(n for n in names if names.count(n) > 1)} is given twice")

    @property
    def source(self) -> str:
        """All sources."""
        return " + ".join(self.parts)

    def size(self, use: Use) -> int:
        """Rows of all parts together."""
        return sum(part.size(use) for part in self.parts.values())

    def load(self, entry: SampleEntry) -> Sample:
        """The sample from the part that ``entry.source`` names. Raises `BadSample`, and as `TableData.load`."""
        if entry.source not in self.parts:
            raise InputError(
                f"sample {entry.id} is from {entry.source}, but the data sets are {self.source}; give those that the "
                "run was begun with, or begin a new run"
            )
        return self.parts[entry.source].load(entry)


def choose_samples(data: DataSet, count: int, held_out: int, seed: int) -> list[SampleEntry]:
    """Seeded choice of ``count`` calibration rows and ``held_out`` others for evaluation.

    The parts of a mixture get equal shares of both, as far as their sizes allow, and are interleaved. If there
    are too few rows for both uses, a fifth (at least one) is held out.
    """
    parts = list(data.parts.values()) if isinstance(data, Mixture) else [data]
    sizes = [part.size("calibration") for part in parts]
    total = sum(sizes)
    if total < 2:
        raise InputError(
            f"data set {data.source!r} has {total} row; at least two are needed, to search and to evaluate"
        )
    if count + held_out > total:
        held_out = min(held_out, max(1, total // 5))
        count = min(count, total - held_out)
    rows = shares(count + held_out, sizes)
    held = _proportional(held_out, rows)
    known = _Known(parts)
    drawn = [
        _calibration(part, of_it - kept, kept, seed)
        for part, of_it, kept in zip(parts, rows, held, strict=True)
    ]
    known.add(entry for part in drawn for entry in part)
    for part, mine, of_it, kept in zip(parts, drawn, rows, held, strict=True):
        mine += _held_out(part, of_it - kept, kept, seed, known)
    return [
        entry
        for use in ("calibration", "held_out")
        for entry in _interleaved([[entry for entry in part if entry.use == use] for part in drawn])
    ]


def shortage(entries: Sequence[SampleEntry], asked: int | str, asked_held_out: int) -> str | None:
    """A line where there are fewer samples than were asked for, else None; ``auto`` asks for no number."""
    held_out = sum(entry.use == "held_out" for entry in entries)
    calibration = len(entries) - held_out
    short = isinstance(asked, int) and calibration < asked
    if not short and held_out >= asked_held_out:
        return None
    wanted = f"{asked} and {asked_held_out}" if isinstance(asked, int) else f"{asked_held_out} held out"
    return (
        f"notice: fewer samples than asked for: {calibration} to profile and {held_out} held out ({wanted} were asked "
        "for); the data set has no more that differ"
    )


def shares(count: int, sizes: Sequence[int]) -> list[int]:
    """``count`` split into equal whole shares, none above its size; earlier ones are one larger where need be."""
    given = [0] * len(sizes)
    while left := min(count, sum(sizes)) - sum(given):
        open_parts = [part for part, size in enumerate(sizes) if given[part] < size]
        # All open parts have equal shares: raise them together while possible, then the first few by one.
        each = left // len(open_parts)
        for part in open_parts[:left]:
            given[part] += min(max(1, each), sizes[part] - given[part])
    return given


def in_turn(entries: Sequence[SampleEntry], seed: int) -> list[SampleEntry]:
    """The entries in seeded order, question types in turn."""
    by_type: dict[str, list[SampleEntry]] = {}
    for index in np.random.default_rng(seed).permutation(len(entries)):
        by_type.setdefault(entries[index].question_type, []).append(entries[index])
    ranked = [
        (rank, kind, entry.id, entry)
        for kind, some in sorted(by_type.items())
        for rank, entry in enumerate(some)
    ]
    return [entry for *_, entry in sorted(ranked, key=lambda item: item[:3])]


def _proportional(count: int, sizes: Sequence[int]) -> list[int]:
    """``count`` split in proportion to ``sizes``, by largest remainder."""
    exact = [count * size / max(1, sum(sizes)) for size in sizes]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda part: whole[part] - exact[part])
    for part in by_remainder[: count - sum(whole)]:
        whole[part] += 1
    return whole


def _calibration(data: DataSet, count: int, held_out: int, seed: int) -> list[SampleEntry]:
    if isinstance(data, (DemoData, PhotoData)):
        return data.entries(count, held_out)[:count]
    return [_entry(data, row, "calibration") for row in _order(data, seed)[:count]]


def _held_out(data: DataSet, count: int, held_out: int, seed: int, known: _Known) -> list[SampleEntry]:
    """The held-out entries of a part whose ``count`` calibration rows come first; those that are `_Known` are left out."""
    if isinstance(data, (DemoData, PhotoData)):
        return data.entries(count, held_out)[count:]
    found: list[SampleEntry] = []
    for row in _order(data, seed)[count:][: LOOKED_AT * max(held_out, 100)]:
        if len(found) == held_out:
            break
        entry = _entry(data, row, "held_out")
        if not known.has(entry):
            known.add([entry])
            found.append(entry)
    return found


def _order(data: DataSet, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(data.size("calibration")).tolist()


def _entry(data: DataSet, row: int, use: Use) -> SampleEntry:
    """The entry of a row, with its question and answers where the data set can tell them without its images."""
    entry = SampleEntry(id=f"{data.source}:{row:06d}", source=data.source, row=row, use=use)
    return data.described(entry) if isinstance(data, TableData) else entry


class _Known:
    """Tells copies of chosen samples, in any part of a mixture: they say nothing new when they are held out."""

    def __init__(self, parts: Sequence[DataSet]) -> None:
        self._tables = {part.source: part for part in parts if isinstance(part, TableData)}
        self._media: dict[str, str | None] = {}
        self._by_text: dict[tuple[str, str | None], list[SampleEntry]] = {}

    def add(self, entries: Iterable[SampleEntry]) -> None:
        """Later entries with the question, answer and images of one of these are copies."""
        for entry in entries:
            self._by_text.setdefault((entry.question, entry.answer), []).append(entry)

    def has(self, entry: SampleEntry) -> bool:
        """Whether it is a copy; images are read only where question and answer agree."""
        same_text = self._by_text.get((entry.question, entry.answer), ()) if entry.question else ()
        return any(self._media_of(one) == self._media_of(entry) is not None for one in same_text)

    def _media_of(self, entry: SampleEntry) -> str | None:
        if entry.id not in self._media:
            table = self._tables.get(entry.source)
            self._media[entry.id] = None if table is None else table.media_of(entry)
        return self._media[entry.id]


def _interleaved(parts: Sequence[Sequence[SampleEntry]]) -> list[SampleEntry]:
    """One list in which every part is spread evenly, so that any first entries are a fair mixture."""
    ranked = [
        ((index + 0.5) / len(part), number, entry)
        for number, part in enumerate(parts)
        for index, entry in enumerate(part)
    ]
    return [entry for _, _, entry in sorted(ranked, key=lambda item: item[:2])]
