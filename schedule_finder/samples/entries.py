"""What a sample is, where it stands in its data set, and the file that lists the samples of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

from schedule_finder.errors import InputError
from schedule_finder.files import write_text, writing

Use = Literal["calibration", "held_out"]


class BadSample(ValueError):
    """One sample that cannot be used; it is skipped with this reason."""


@dataclass(frozen=True)
class Sample:
    """Image(s) or video(s), a question, and the answer where it is known.

    All images are RGB and upright; a video is its frames, in order. ``regions``: vision tokens (row-major) that
    the answer needs, where the data set knows them. ``repairs``: what had to be done to use the sample.
    """

    id: str
    images: tuple[Image.Image, ...]
    question: str
    answer: str | None
    question_type: str = "all"
    regions: tuple[int, ...] = ()
    videos: tuple[tuple[Image.Image, ...], ...] = ()
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampleEntry:
    """A line of ``1_samples.jsonl``: where a sample is, what it is for, how it went.

    ``source`` names its data set and ``row`` its place there; image data stays there. ``reason`` says why a
    sample was skipped, or what was repaired on one that was not.
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


class DataSet(Protocol):
    """Rows that can be loaded one at a time."""

    @property
    def source(self) -> str:
        """Name of the data set, the same on every machine: sample ids begin with it."""

    def size(self, use: Use) -> int:
        """Rows there are for this use."""

    def load(self, entry: SampleEntry) -> Sample:
        """The sample of an entry. Raises `BadSample`."""


def describe(entry: SampleEntry, sample: Sample) -> SampleEntry:
    """The entry with what its sample says."""
    reason = f"repaired: {'; '.join(sample.repairs)}" if sample.repairs else None
    return replace(
        entry,
        question=sample.question,
        answer=sample.answer,
        question_type=sample.question_type,
        reason=reason,
    )


def write_entries(path: Path, entries: Sequence[SampleEntry]) -> None:
    """Write ``1_samples.jsonl``."""
    write_text(path, "".join(map(_line, entries)))
    _updates(path).unlink(missing_ok=True)


def update_entries(path: Path, changed: Sequence[SampleEntry]) -> None:
    """Note entries that changed beside ``1_samples.jsonl``, in time that does not grow with that file.

    `read_entries` takes the notes in, `write_entries` ends them.
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
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not readable ({error}); remove it and profile again") from error


def _updates(path: Path) -> Path:
    return path.with_name(path.name + ".updates")


def _read_updates(path: Path) -> Iterator[SampleEntry]:
    if not _updates(path).exists():
        return
    for line in _updates(path).read_text(encoding="utf-8").splitlines():
        # A line that a killed process or a full disk cut off is a sample that is done again.
        with suppress(ValueError, TypeError):
            yield _entry(line)


def _line(entry: SampleEntry) -> str:
    return json.dumps({k: v for k, v in vars(entry).items() if v is not None}) + "\n"


def _entry(line: str) -> SampleEntry:
    return SampleEntry(**json.loads(line))
