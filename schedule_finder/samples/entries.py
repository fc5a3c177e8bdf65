"""Samples, their entries in the list of samples of a run, and the interface of data sets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

from schedule_finder.errors import BadSample, InputError
from schedule_finder.files import parse_json, write_text, writing

__all__ = [
    "BadSample",
    "DataSet",
    "Sample",
    "SampleEntry",
    "Use",
    "describe",
    "read_entries",
    "update_entries",
    "write_entries",
]

Use = Literal["calibration", "held_out"]
_OLD_USES = {"discovery": "calibration"}
"""Names in lists of samples that were written before profile format version 2."""


@dataclass(frozen=True)
class Sample:
    """Image(s) or video(s), a question, and the answer where it is known.

    All images are RGB and upright; a video is its frames, in order. ``regions``: vision tokens (row-major) that
    the answer depends on, where the data set states them. ``repairs``: changes that made the sample usable.
    ``references``: all reference answers, where there are several; ``answer`` is one of them. ``metric``: of
    `schedule_finder.evaluation.metrics`, where the data set has its own. ``media``: hash of its files, where it has any.
    """

    id: str
    images: tuple[Image.Image, ...]
    question: str
    answer: str | None
    question_type: str = "all"
    regions: tuple[int, ...] = ()
    videos: tuple[tuple[Image.Image, ...], ...] = ()
    repairs: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    metric: str | None = None
    media: str | None = None

    @property
    def all_references(self) -> tuple[str, ...]:
        """Every reference answer; empty where none is known."""
        return self.references or (() if self.answer is None else (self.answer,))


@dataclass(frozen=True)
class SampleEntry:
    """A line of ``1_samples.jsonl``: origin, use and status of a sample.

    ``source`` names its data set and ``row`` its row there; images are not copied. ``reason`` says why a
    sample was skipped, or what was repaired on one that was not. ``references``: all answers, where there are several.
    ``media``: hash of its image files. Question, answers and hash tell whether the data set is still the same.
    """

    id: str
    source: str
    row: int
    use: Use
    question: str = ""
    answer: str | None = None
    question_type: str = "all"
    status: Literal["pending", "done", "skipped"] = "pending"
    reason: str | None = None
    references: tuple[str, ...] | None = None
    media: str | None = None


class DataSet(Protocol):
    """Rows that can be loaded one at a time."""

    @property
    def source(self) -> str:
        """Name of the data set, the same on every machine: sample ids begin with it."""

    def size(self, use: Use) -> int:
        """Number of rows for this use."""

    def load(self, entry: SampleEntry) -> Sample:
        """The sample of an entry. Raises `BadSample`."""


def describe(entry: SampleEntry, sample: Sample) -> SampleEntry:
    """The entry with question, answer, type and repairs of its sample."""
    reason = f"repaired: {'; '.join(sample.repairs)}" if sample.repairs else None
    return replace(
        entry,
        question=sample.question,
        answer=sample.answer,
        question_type=sample.question_type,
        reason=reason,
        references=sample.references or None,
        media=sample.media,
    )


def write_entries(path: Path, entries: Sequence[SampleEntry]) -> None:
    """Write ``1_samples.jsonl``."""
    write_text(path, "".join(map(_line, entries)))
    _updates(path).unlink(missing_ok=True)


def update_entries(path: Path, changed: Sequence[SampleEntry]) -> None:
    """Append changed entries to ``1_samples.jsonl.updates``, in time that does not grow with the list.

    `read_entries` applies the updates, `write_entries` removes them.
    """
    with writing(path), _updates(path).open("a", encoding="utf-8") as file:
        file.write("".join(map(_line, changed)))


def read_entries(path: Path) -> list[SampleEntry]:
    """Read ``1_samples.jsonl``. Raises `InputError`."""
    try:
        entries = {entry.id: entry for entry in map(_entry, path.read_text(encoding="utf-8").splitlines())}
        entries |= {entry.id: entry for entry in _read_updates(path)}
        return list(entries.values())
    except FileNotFoundError:
        raise InputError(f"{path}: no samples chosen yet; run `adaptinfer-profile profile` first") from None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not readable ({error}); remove it and profile again") from error


def _updates(path: Path) -> Path:
    return path.with_name(path.name + ".updates")


def _read_updates(path: Path) -> Iterator[SampleEntry]:
    if not _updates(path).exists():
        return
    for line in _updates(path).read_text(encoding="utf-8").splitlines():
        # A killed process or a full disk can truncate the last line; that sample is profiled again.
        with suppress(ValueError, TypeError, KeyError):
            yield _entry(line)


def _line(entry: SampleEntry) -> str:
    return json.dumps({k: v for k, v in vars(entry).items() if v is not None}) + "\n"


def _entry(line: str) -> SampleEntry:
    fields = parse_json(line)
    fields["use"] = _OLD_USES.get(fields["use"], fields["use"])
    if fields.get("references") is not None:
        fields["references"] = tuple(fields["references"])
    return SampleEntry(**fields)
