"""Step 1: a data set as people have it becomes seeded, numbered samples.

Which rows are for discovery and which are held out for evaluation is decided here, once, and written to
``1_samples.jsonl``: discovery never sees the samples that a schedule is judged on.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image, ImageOps

from schedule_finder.demo import demo_samples
from schedule_finder.errors import InputError
from schedule_finder.files import write_text, writing

Use = Literal["discovery", "held_out"]
IMAGE_COLUMNS = ("image", "images", "image_path", "img", "picture")
QUESTION_COLUMNS = ("question", "query", "prompt", "instruction", "text")
ANSWER_COLUMNS = ("answer", "answers", "label", "target", "response")
TYPE_COLUMNS = ("question_type", "category", "task", "type")
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


class BadSample(ValueError):
    """One sample that cannot be used; it is skipped with this reason."""


@dataclass(frozen=True)
class Sample:
    """Image(s), a question, and the answer where it is known.

    ``regions``: vision tokens (row-major) that the answer needs, where the data set knows them.
    """

    id: str
    images: tuple[Image.Image, ...]
    question: str
    answer: str | None
    question_type: str = "all"
    regions: tuple[int, ...] = ()


@dataclass(frozen=True)
class SampleEntry:
    """A line of ``1_samples.jsonl``: where a sample is, what it is for, how it went.

    ``row`` is its place in the data set; image data stays there.
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

    source: str

    def size(self, use: Use) -> int:
        """Rows there are for this use."""

    def load(self, entry: SampleEntry) -> Sample:
        """The sample of an entry. Raises `BadSample`."""


class DemoData:
    """The embedded demo data set; discovery and held-out samples come from disjoint seeds."""

    source = "demo"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._drawn: dict[Use, list[Sample]] = {"discovery": [], "held_out": []}
        self._streams: dict[Use, Iterator[Any]] = {}

    def size(self, use: Use) -> int:
        """As many as anybody wants."""
        return 1_000_000

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


class TableData:
    """A table that `datasets` reads: a hub name, or a local JSON lines, Parquet, CSV or image folder.

    Image columns hold paths relative to the file, encoded images, or lists of either.
    """

    def __init__(
        self,
        source: str,
        *,
        split: str | None = None,
        image_column: str | None = None,
        question_column: str | None = None,
        answer_column: str | None = None,
    ) -> None:
        self.source = source
        self._table, self._folder = _open_table(source, split)
        if len(self._table) == 0:
            raise InputError(f"data set {source!r} is empty")
        columns = self._table.column_names
        self._image: str = _column(image_column, IMAGE_COLUMNS, columns, "--image-column", source)
        self._question = _column(question_column, QUESTION_COLUMNS, columns, "--question-column", source)
        self._answer = _column(
            answer_column, ANSWER_COLUMNS, columns, "--answer-column", source, needed=False
        )
        self._type = next((name for name in TYPE_COLUMNS if name in columns), None)
        self._table = _undecoded(self._table, self._image)

    def size(self, use: Use) -> int:
        """Rows of the table, whatever they are for."""
        return len(self._table)

    def load(self, entry: SampleEntry) -> Sample:
        """Read one row and decode its images."""
        row = self._table[entry.row]
        question = str(row[self._question] or "").strip()
        if not question:
            raise BadSample("the question is empty")
        answer = row[self._answer] if self._answer else None
        if isinstance(answer, (list, tuple)):
            answer = answer[0] if answer else None
        cells = row[self._image]
        cells = cells if isinstance(cells, list) else [cells]
        return Sample(
            id=entry.id,
            images=tuple(self._image_of(cell) for cell in cells),
            question=question,
            answer=None if answer is None else str(answer),
            question_type=str(row[self._type]) if self._type else "all",
        )

    def _image_of(self, cell: Any) -> Image.Image:
        if isinstance(cell, Image.Image):
            return _rgb(cell)
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (None, cell)
        if data is None and not path:
            raise BadSample("there is no image")
        if data is None and "://" in str(path):
            raise BadSample(f"image {path!r} is a URL; download the images and give local paths")
        source = io.BytesIO(data) if data is not None else self._folder / str(path)
        try:
            with Image.open(source) as image:
                return _rgb(image)
        except FileNotFoundError:
            raise BadSample(f"image {path!r} does not exist below {self._folder}") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BadSample(f"image {path!r} cannot be read: {error}") from error


def open_data(source: str, *, seed: int = 0, **columns: str | None) -> DataSet:
    """The data set called ``source``: ``demo``, a local file or folder, or a hub name. Raises `InputError`."""
    return DemoData(seed) if source == "demo" else TableData(source, **columns)


def choose_samples(data: DataSet, count: int, held_out: int, seed: int) -> list[SampleEntry]:
    """Seeded choice of ``count`` rows for discovery and ``held_out`` others for evaluation.

    A data set that is too small for both gives a fifth of its rows (at least one) to evaluation.
    """
    if isinstance(data, DemoData):
        wanted: list[tuple[Use, int]] = [("discovery", count), ("held_out", held_out)]
        return [
            SampleEntry(id=f"{use}-{seed}-{row:06d}", source=data.source, row=row, use=use)
            for use, number in wanted
            for row in range(number)
        ]
    total = data.size("discovery")
    if total < 2:
        raise InputError(
            f"data set {data.source!r} has {total} row; two are the least, to discover and to evaluate"
        )
    if count + held_out > total:
        held_out = min(held_out, max(1, total // 5))
        count = min(count, total - held_out)
    order = np.random.default_rng(seed).permutation(total)[: count + held_out]
    width = len(str(total - 1))
    return [
        SampleEntry(
            id=f"{int(row):0{width}d}",
            source=data.source,
            row=int(row),
            use="discovery" if i < count else "held_out",
        )
        for i, row in enumerate(order)
    ]


def describe(entry: SampleEntry, sample: Sample) -> SampleEntry:
    """The entry with what its sample says."""
    return replace(entry, question=sample.question, answer=sample.answer, question_type=sample.question_type)


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
        if _updates(path).exists():
            # What follows the last line's end was cut off by whatever ended the process.
            whole, _, _ = _updates(path).read_text(encoding="utf-8").rpartition("\n")
            entries |= {entry.id: entry for entry in map(_entry, whole.splitlines())}
        return list(entries.values())
    except FileNotFoundError:
        raise InputError(f"{path}: no samples chosen yet; run `adaptinfer-profile profile` first") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not readable ({error}); remove it and profile again") from error


def _updates(path: Path) -> Path:
    return path.with_name(path.name + ".updates")


def _line(entry: SampleEntry) -> str:
    return json.dumps({k: v for k, v in vars(entry).items() if v is not None}) + "\n"


def _entry(line: str) -> SampleEntry:
    return SampleEntry(**json.loads(line))


def _open_table(source: str, split: str | None) -> tuple[Any, Path]:
    import datasets

    datasets.disable_progress_bars()
    path = Path(source).expanduser()
    local = path.exists() or source.startswith((".", "/", "~")) or path.suffix in _FORMATS
    try:
        if path.is_dir():
            return datasets.load_dataset("imagefolder", data_dir=str(path), split=split or "train"), path
        if local:
            if not path.exists():
                raise InputError(f"data set {source!r}: no such file")
            if path.suffix not in _FORMATS:
                raise InputError(f"data set {source!r}: {path.suffix!r} is none of {', '.join(_FORMATS)}")
            table = datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
            return table, path.parent
        return datasets.load_dataset(source, split=split or "test"), Path()
    except InputError:
        raise
    except Exception as error:  # `datasets` wraps whatever its readers raise in types of its own
        lines = str(error.__cause__ or error).strip().splitlines()
        reason = lines[0] if lines else "it holds no rows"
        raise InputError(
            f"data set {source!r} cannot be read: {reason} (known: `demo`, a local .jsonl, .parquet, .csv or image "
            "folder, or a hub name that can be reached)"
        ) from error


def _undecoded(table: Any, column: str) -> Any:
    """The table with its images left as bytes, so that one unreadable image spoils one row only."""
    import datasets

    feature = table.features[column]
    if isinstance(feature, datasets.Image):
        return table.cast_column(column, datasets.Image(decode=False))
    if isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
        return table.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return table


def _column(
    chosen: str | None,
    guesses: Sequence[str],
    columns: Sequence[str],
    option: str,
    source: str,
    *,
    needed: bool = True,
) -> Any:
    """The column to read: the chosen one, the first guess that is there, or None where it is not ``needed``."""
    if chosen is not None:
        if chosen not in columns:
            raise InputError(f"{option} {chosen!r}: data set {source!r} has the columns {', '.join(columns)}")
        return chosen
    found = next((name for name in guesses if name in columns), None)
    if found is None and needed:
        raise InputError(
            f"data set {source!r} has the columns {', '.join(columns)}; none of {', '.join(guesses)} is among "
            f"them, so name it with {option}"
        )
    return found


def _rgb(image: Image.Image) -> Image.Image:
    """RGB pixels, upright; transparent parts on white."""
    image = ImageOps.exif_transpose(image)
    if min(image.size) < 1:
        raise BadSample("the image has no pixels")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")
