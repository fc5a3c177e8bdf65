"""Data sets that the `datasets` library reads: hub names, local files and folders, presets of either."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from schedule_finder.errors import InputError
from schedule_finder.samples.columns import Columns, find_columns
from schedule_finder.samples.entries import BadSample, Sample, SampleEntry, Use
from schedule_finder.samples.images import open_image, reading, upright_rgb
from schedule_finder.samples.presets import ImagesElsewhere
from schedule_finder.samples.table_source import (
    DataOptions,
    column_names,
    expanded,
    load_table,
    loading,
    open_table,
    resolve_source,
    spooled,
    undecoded,
)
from schedule_finder.samples.videos import open_video, spread

STREAMED = 4
"""Rows that streaming reads for each sample of the run; the samples are drawn from these."""
_VIDEO_FILES = {
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp", ".gif",
}  # fmt: skip
"""In a list each of these is a video; any other file is a frame."""
_FINGERPRINTED = 16
_HASHED_BYTES = 2**16
"""Of a video file, so many at its beginning and at its end are hashed."""


class TableData:
    """Rows of one table: a hub name, a local file or folder, or a preset of either.

    Image cells hold paths (relative to the file or folder), encoded images, or lists of either; video cells a
    path, an encoded video, a list of frames, or a list of paths of videos.

    Args:
        given: ``lmms-lab/POPE``, ``data.jsonl``, ``pope`` or ``pope=data.parquet``.
        options: the user's options.
        rows: number of samples that the run needs; streaming reads `STREAMED` times as many rows.

    Raises:
        InputError: there is no such data set, it cannot be read, or lacks a column.
    """

    def __init__(self, given: str, options: DataOptions | None = None, *, rows: int = 1000) -> None:
        options = options or DataOptions()
        preset_name, preset, location = resolve_source(given)
        table, self._folder, split = open_table(location, preset, options)
        self._elsewhere = None
        self._metric = preset.metric if preset else None
        image, video = options.image_column, options.video_column
        if preset and not (image or video):
            image, video = preset.image, preset.video
            if preset.images_elsewhere and preset.images_elsewhere.image not in table.column_names:
                image = preset.images_elsewhere.key
                self._elsewhere = _OtherImages(location, split, preset.images_elsewhere)
        table = expanded(table)
        template = options.question_template
        if preset and template is None and options.question_column is None:
            template = preset.question_template
        self._columns: Columns = find_columns(
            column_names(table, given),
            given,
            image=image,
            video=video,
            question=options.question_column,
            question_template=template,
            answer=options.answer_column or (preset.answer if preset else None),
            answer_form=preset.answer_form if preset else "text",
            question_type=preset.question_type if preset else None,
        )
        self._frames = options.frames
        self._outside = options.allow_outside_paths
        table = table.select_columns(list(dict.fromkeys(self._columns.media + self._columns.text)))
        table = undecoded(table)
        if options.streaming:
            table = spooled(table, STREAMED * rows, given)
        if len(table) == 0:
            raise InputError(f"data set {given!r} is empty")
        self._table = table
        self._texts = table.select_columns(list(dict.fromkeys(self._columns.text)))
        self._labels = {
            name: feature.names for name, feature in table.features.items() if hasattr(feature, "names")
        }
        local = Path(location).expanduser().resolve().stem if self._folder else location
        self._name = preset_name or local
        self._source = f"{self._name}@{self._fingerprint()}"

    @property
    def source(self) -> str:
        """Name of the data set and a hash of its first questions, since different files often have the same name."""
        return self._source

    def size(self, use: Use) -> int:
        """Rows of the table, for either use."""
        return len(self._table)

    def load(self, entry: SampleEntry) -> Sample:
        """Read one row and decode its images and videos.

        Raises:
            BadSample: the row cannot be used.
            InputError: the entry is of a data set that has changed since.
        """
        renamed = entry.source.startswith(f"{self._name}@") and entry.source != self.source
        if renamed or entry.row >= len(self._table):
            raise InputError(
                f"data set {self._name!r} has changed (sample {entry.id} is not in it); give the one that the run was "
                "begun with, or begin a new run"
            )
        row = self._row(self._table, entry.row)
        question = self._columns.question_of(row)
        images, repairs = [], []
        for cell in self._images(row):
            image, notes = self._image(cell)
            images.append(image)
            repairs += notes
        videos = []
        for cell in self._videos(row):
            frames, notes = self._video(cell)
            videos.append(frames)
            repairs += notes
        if not images and not videos:
            raise BadSample("there is no image")
        sample = Sample(
            id=entry.id,
            images=tuple(images),
            question=question,
            answer=self._columns.answer_of(row),
            question_type=self._columns.type_of(row),
            videos=tuple(videos),
            repairs=tuple(dict.fromkeys(repairs)),
            references=self._columns.references_of(row),
            metric=self._metric,
            media=self._media_digest(row),
        )
        self._check_same(entry, sample)
        return sample

    def described(self, entry: SampleEntry) -> SampleEntry:
        """The entry with its row's question and answers, read without its images; unchanged where they are unusable."""
        try:
            row = self._row(self._texts, entry.row)
            question = self._columns.question_of(row)
        except BadSample:
            return entry
        answer, several = self._columns.answer_of(row), self._columns.references_of(row)
        return replace(entry, question=question, answer=answer, references=several or None)

    def media_of(self, entry: SampleEntry) -> str | None:
        """Hash of the files of a row's images and videos; None where one cannot be read."""
        try:
            return self._media_digest(self._row(self._table, entry.row))
        except (BadSample, OSError):
            return None

    def _check_same(self, entry: SampleEntry, sample: Sample) -> None:
        """Raise `InputError` where the row is not what the run's list of samples says of it."""
        known = (entry.question, entry.answer, entry.references or ())
        changed = entry.question and known != (sample.question, sample.answer, sample.references)
        if changed or (entry.media is not None and entry.media != sample.media):
            raise InputError(
                f"data set {self._name!r} has changed: {'question or answer' if changed else 'an image'} of sample "
                f"{entry.id} is not what it was when the run was begun; restore it, or begin a new run"
            )

    def _row(self, table: Any, number: int) -> dict[str, Any]:
        try:
            return self._named(table[number])
        except UnicodeDecodeError as error:
            raise BadSample(f"the row is no UTF-8 text ({error})") from error

    def _media_digest(self, row: Mapping[str, Any]) -> str:
        """Hash of the files of a row's images and of the frames that are taken; of a video file, of its ends and size."""
        found = hashlib.sha256()
        images = list(self._images(row))
        for cell in self._videos(row):
            if isinstance(cell, list):
                images += [cell[index] for index in spread(len(cell), self._frames)]
            elif not _is_empty(cell):
                found.update(_ends(self._file(cell, "video")[0]))
        for cell in images:
            if isinstance(cell, Image.Image):
                found.update(cell.tobytes())
                continue
            file, _ = self._file(cell, "image")
            found.update(file if isinstance(file, bytes) else file.read_bytes())
        return found.hexdigest()[:12]

    def _named(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with class numbers replaced by names; a negative number is an unknown class."""
        for column, names in self._labels.items():
            if (number := row.get(column)) is not None:
                row[column] = names[number] if number >= 0 else None
        return row

    def _images(self, row: Mapping[str, Any]) -> list[Any]:
        """All image cells, lists flattened, without empty cells."""
        cells = _flat(self._columns.images_of(row))
        cells = [cell for cell in cells if not _is_empty(cell)]
        return [self._elsewhere.find(cell) for cell in cells] if self._elsewhere else cells

    def _videos(self, row: Mapping[str, Any]) -> list[Any]:
        """Every cell with a video: a list of frames is one, a list of video files is several."""
        cells: list[Any] = []
        for cell in self._columns.videos_of(row):
            several = isinstance(cell, list) and all(
                isinstance(path, str) and Path(path).suffix.lower() in _VIDEO_FILES for path in cell
            )
            cells += cell if several else [cell]
        return cells

    def _image(self, cell: Any) -> tuple[Image.Image, list[str]]:
        if isinstance(cell, Image.Image):
            with reading("image", "in the row"):
                return upright_rgb(cell)
        return open_image(*self._file(cell, "image"))

    def _video(self, cell: Any) -> tuple[tuple[Image.Image, ...], list[str]]:
        if _is_empty(cell) or cell == []:
            raise BadSample("there is no video")
        if not isinstance(cell, list):
            return open_video(*self._file(cell, "video"), self._frames), []
        frames = [self._image(cell[index]) for index in spread(len(cell), self._frames)]
        return tuple(image for image, _ in frames), [note for _, notes in frames for note in notes]

    def _file(self, cell: Any, kind: str) -> tuple[Path | bytes, str]:
        """File or bytes to open, and the name for messages."""
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (None, cell)
        if isinstance(path, bytes):
            data, path = path, None
        if data is not None:
            return data, str(path or "in the row")
        if not isinstance(path, str) or not path:
            raise BadSample(f"there is no {kind}")
        if "://" in path:
            raise BadSample(f"{kind} {path!r} is a URL; download the {kind}s and give local paths")
        if self._folder is None:
            raise BadSample(
                f"{kind} {path!r} is a name only; download the data set's repository and give its folder"
            )
        # Not `resolve`: a link inside the folder was made by its owner, a path in a data file by anybody.
        folder = os.path.normpath(self._folder.absolute())
        file = Path(os.path.normpath((self._folder / path).absolute()))
        if not file.is_relative_to(folder) and not self._outside:
            raise InputError(
                f"{kind} {path!r} lies outside the data set's folder {self._folder}; move the {kind}s there, or give "
                "--allow-outside-paths if you trust the data file"
            )
        if not file.is_file():
            raise BadSample(f"{kind} {path!r} does not exist below {self._folder}")
        return file, path

    def _fingerprint(self) -> str:
        with loading(self._name):
            few = self._texts[:_FINGERPRINTED]
        rows = [
            self._named(dict(zip(few, values, strict=True))) for values in zip(*few.values(), strict=True)
        ]
        texts = [[self._columns.question_text(row), self._columns.answer_of(row)] for row in rows]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:6]


class _OtherImages:
    """Images of a data set that stores them in a separate config."""

    def __init__(self, location: str, split: str, columns: ImagesElsewhere) -> None:
        with loading(location):
            table = load_table(location, columns.config, split, streaming=False)
        self._image = columns.image
        self._table = undecoded(table.select_columns([columns.id, columns.image]))
        self._rows = {
            str(name): row for row, name in enumerate(table.select_columns([columns.id])[columns.id])
        }

    def find(self, key: Any) -> Any:
        if str(key) not in self._rows:
            raise BadSample(f"there is no image {key!r}")
        return self._table[self._rows[str(key)]][self._image]


def _flat(cells: Iterable[Any]) -> list[Any]:
    """Cells in order, with the items of those that are lists."""
    return [item for cell in cells for item in (cell if isinstance(cell, list) else [cell])]


def _ends(file: Path | bytes) -> bytes:
    """The size of a video file and its first and last `_HASHED_BYTES`: reading all of it would take long."""
    if isinstance(file, bytes):
        return str(len(file)).encode() + file[:_HASHED_BYTES] + file[-_HASHED_BYTES:]
    size = file.stat().st_size
    with file.open("rb") as content:
        begin = content.read(_HASHED_BYTES)
        content.seek(max(size - _HASHED_BYTES, 0))
        return str(size).encode() + begin + content.read(_HASHED_BYTES)


def _is_empty(cell: Any) -> bool:
    if isinstance(cell, dict):
        return cell.get("bytes") is None and not cell.get("path")
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))
