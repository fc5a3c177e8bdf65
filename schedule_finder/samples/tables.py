"""Data sets that the `datasets` library reads: hub names, local files and folders, presets of either."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image

from schedule_finder.errors import InputError
from schedule_finder.samples.columns import Columns, find_columns
from schedule_finder.samples.entries import BadSample, Sample, SampleEntry, Use
from schedule_finder.samples.images import open_image, reading, upright_rgb
from schedule_finder.samples.presets import ImagesElsewhere, Preset, presets
from schedule_finder.samples.videos import open_video, spread

FRAMES = 8
STREAMED = 4
"""Rows that streaming reads for each sample that is asked for: samples are drawn among these."""
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
}
_SPLITS = ("test", "validation", "val", "dev", "train")
"""Which split is read where none was named and there are several."""
_VIDEO_FILES = {
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp", ".gif",
}  # fmt: skip
"""In a list these are videos each; any other file is a frame."""
_FINGERPRINTED = 16


@dataclass(frozen=True)
class DataOptions:
    """What a user said about a data set; None: guessed, or as the preset has it.

    ``image_column`` and ``video_column`` are a column, several with commas between, or a template of a path over
    columns (``videos/{video_id}.mp4``). ``frames``: to take from each video.
    """

    split: str | None = None
    config: str | None = None
    streaming: bool = False
    image_column: str | None = None
    video_column: str | None = None
    question_column: str | None = None
    question_template: str | None = None
    answer_column: str | None = None
    frames: int = FRAMES


class TableData:
    """Rows of one table: a hub name, a local file or folder, or a preset of either.

    Image cells hold paths (relative to the file or folder), encoded images, or lists of either; video cells a
    path, an encoded video, a list of frames, or a list of paths of videos.

    Args:
        given: ``lmms-lab/POPE``, ``data.jsonl``, ``pope`` or ``pope=data.parquet``.
        options: what the user said about it.
        rows: how many samples will be asked for; streaming reads `STREAMED` times as many rows.

    Raises:
        InputError: there is no such data set, it cannot be read, or lacks a column.
    """

    def __init__(self, given: str, options: DataOptions = DataOptions(), *, rows: int = 1000) -> None:
        preset_name, preset, place = _resolve(given)
        table, self._folder, split = _open(place, preset, options)
        self._elsewhere = None
        image, video = options.image_column, options.video_column
        if preset and not (image or video):
            image, video = preset.image, preset.video
            if preset.images_elsewhere and preset.images_elsewhere.image not in table.column_names:
                image = preset.images_elsewhere.key
                self._elsewhere = _OtherImages(place, split, preset.images_elsewhere)
        template = options.question_template
        if preset and template is None and options.question_column is None:
            template = preset.question_template
        self._columns: Columns = find_columns(
            _names(table, given),
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
        table = table.select_columns(list(dict.fromkeys(self._columns.media + self._columns.text)))
        table = _undecoded(table)
        if options.streaming:
            table = _spooled(table, STREAMED * rows, given)
        if len(table) == 0:
            raise InputError(f"data set {given!r} is empty")
        self._table = table
        self._labels = {
            name: feature.names for name, feature in table.features.items() if hasattr(feature, "names")
        }
        local = Path(place).expanduser().resolve().stem if self._folder else place
        self._name = preset_name or local
        self._source = f"{self._name}@{self._fingerprint()}"

    @property
    def source(self) -> str:
        """Name of the data set and a fingerprint of its first questions: data files are often called alike."""
        return self._source

    def size(self, use: Use) -> int:
        """Rows of the table, whatever they are for."""
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
                f"data set {self._name!r} is another one now (sample {entry.id} is not in it); give back the one that "
                "the run was begun with, or begin a new run"
            )
        row = self._named(self._table[entry.row])
        question = self._columns.question_of(row)
        images, repairs = [], []
        for cell in self._images(row):
            image, notes = self._image(self._elsewhere.find(cell) if self._elsewhere else cell)
            images.append(image)
            repairs += notes
        videos = []
        for cell in self._videos(row):
            frames, notes = self._video(cell)
            videos.append(frames)
            repairs += notes
        if not images and not videos:
            raise BadSample("there is no image")
        return Sample(
            id=entry.id,
            images=tuple(images),
            question=question,
            answer=self._columns.answer_of(row),
            question_type=self._columns.type_of(row),
            videos=tuple(videos),
            repairs=tuple(dict.fromkeys(repairs)),
        )

    def _named(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with classes by their names; a negative number is a class that is not known."""
        for column, names in self._labels.items():
            if (number := row.get(column)) is not None:
                row[column] = names[number] if number >= 0 else None
        return row

    def _images(self, row: Mapping[str, Any]) -> list[Any]:
        """Every cell with an image: lists are spread out, empty ones left out."""
        cells = []
        for template in self._columns.images:
            cell = template.cell(row)
            cells += cell if isinstance(cell, list) else [cell]
        return [cell for cell in cells if not _is_empty(cell)]

    def _videos(self, row: Mapping[str, Any]) -> list[Any]:
        """Every cell with a video: a list of frames is one, a list of video files is several."""
        cells: list[Any] = []
        for template in self._columns.videos:
            cell = template.cell(row)
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
        frames = [self._image(cell[place]) for place in spread(len(cell), self._frames)]
        return tuple(image for image, _ in frames), [note for _, notes in frames for note in notes]

    def _file(self, cell: Any, kind: str) -> tuple[Path | bytes, str]:
        """What to open, and its name."""
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
        file = self._folder / path
        if not file.is_file():
            raise BadSample(f"{kind} {path!r} does not exist below {self._folder}")
        return file, path

    def _fingerprint(self) -> str:
        few = self._table.select_columns(self._columns.text)[:_FINGERPRINTED]
        rows = [
            self._named(dict(zip(few, values, strict=True))) for values in zip(*few.values(), strict=True)
        ]
        texts = [[self._columns.question.fill(row), self._columns.answer_of(row)] for row in rows]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:6]


class _OtherImages:
    """Images of a data set that keeps them in a config of their own."""

    def __init__(self, place: str, split: str, where: ImagesElsewhere) -> None:
        with _loading(place):
            table = _load(place, where.config, split, streaming=False)
        self._image = where.image
        self._table = _undecoded(table.select_columns([where.id, where.image]))
        self._rows = {str(name): row for row, name in enumerate(table.select_columns([where.id])[where.id])}

    def find(self, key: Any) -> Any:
        if str(key) not in self._rows:
            raise BadSample(f"there is no image {key!r}")
        return self._table[self._rows[str(key)]][self._image]


def _resolve(given: str) -> tuple[str | None, Preset | None, str]:
    """``(preset's name, preset, where the data is)``."""
    name, _, place = given.partition("=")
    known = presets()
    if place and not Path(given).exists():
        if name.lower() not in known:
            raise InputError(f"data set {given!r}: {name!r} is no preset; choose {', '.join(known)}")
        return name.lower(), known[name.lower()], place
    if given.lower() in known and not Path(given).exists():
        preset = known[given.lower()]
        if preset.hub is None:
            raise InputError(
                f"data set {given!r}: no hub copy of {preset.title} with its videos is known; give a local copy, "
                f"{given}=FILE, with the columns {', '.join(preset.columns)}"
            )
        return given.lower(), preset, preset.hub
    return None, None, given


def _open(place: str, preset: Preset | None, options: DataOptions) -> tuple[Any, Path | None, str]:
    """``(table, folder that paths are relative to (none on the hub), split)``."""
    path = Path(place).expanduser()
    if "://" in place:
        raise InputError(
            f"data set {place!r} is a URL; download it and give the local file, or give a hub name"
        )
    local = path.exists() or place.startswith((".", "/", "~")) or path.suffix in _FORMATS
    if local and not path.exists():
        raise InputError(f"data set {place!r}: no such file")
    if path.is_file():
        if path.suffix not in _FORMATS:
            raise InputError(f"data set {place!r}: {path.suffix!r} is none of {', '.join(_FORMATS)}")
        return _load_file(path, options.streaming), path.parent, "train"
    place = str(path) if local else place
    with _loading(place):
        config, split = _config_and_split(place, preset, options)
        return _load(place, config, split, options.streaming), path if local else None, split


@contextmanager
def _loading(place: str) -> Iterator[None]:
    """`datasets` wraps whatever its readers raise in types of its own; all become an `InputError`."""
    import datasets

    datasets.disable_progress_bars()
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        lines = str(error.__cause__ or error).strip().splitlines()
        raise InputError(
            f"data set {place!r} cannot be read: {lines[0] if lines else 'it holds no rows'} (known: `demo`, `photo`, "
            f"a local {', '.join(_FORMATS)} file or folder, a preset, or a hub name that can be reached)"
        ) from error


def _load_file(path: Path, streaming: bool) -> Any:
    import datasets

    with _loading(str(path)):
        reader, options = _FORMATS[path.suffix]
        return datasets.load_dataset(
            reader, data_files=str(path), split="train", streaming=streaming, **options
        )


def _load(place: str, config: str | None, split: str, streaming: bool) -> Any:
    """A hub data set or a local folder that is laid out like one, or was saved by `datasets`."""
    import datasets

    if _saved_by_datasets(place):
        saved = datasets.load_from_disk(place)
        return saved[split] if isinstance(saved, dict) else saved
    return datasets.load_dataset(place, config, split=split, streaming=streaming)


def _saved_by_datasets(place: str) -> bool:
    return any((Path(place) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _config_and_split(place: str, preset: Preset | None, options: DataOptions) -> tuple[str | None, str]:
    """What to read: as the options say, else the preset (where the data set has it), else a guess."""
    import datasets

    config = options.config
    if _saved_by_datasets(place):
        saved = datasets.load_from_disk(place)
        splits = list(saved) if isinstance(saved, dict) else ["train"]
    else:
        configs = datasets.get_dataset_config_names(place)
        if config is None:
            config = preset.config if preset and preset.config in configs else None
        if (config is None and len(configs) > 1 and "default" not in configs) or (
            config is not None and config not in configs
        ):
            raise InputError(
                f"data set {place!r} has the configs {', '.join(configs)}; choose one with --dataset-config"
            )
        splits = datasets.get_dataset_split_names(place, config)
    if options.split:
        if options.split.partition("[")[0] not in splits:  # `test[:500]` is a split too
            raise InputError(
                f"--split {options.split!r}: data set {place!r} has the splits {', '.join(splits)}"
            )
        return config, options.split
    preferred = ((preset.split or "") if preset else "", *_SPLITS)
    return config, next((name for name in preferred if name in splits), splits[0])


def _undecoded(table: Any) -> Any:
    """The table with its images and videos left as bytes, so that an unreadable one spoils one row only."""
    import datasets

    for name, feature in (table.features or {}).items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, (datasets.Image, datasets.Video)):
            raw = type(inner)(decode=False)
            table = table.cast_column(name, raw if inner is feature else datasets.List(raw))
    return table


def _names(table: Any, given: str) -> list[str]:
    """Column names; a stream of JSON lines knows them only from its first row."""
    if table.column_names is not None:
        return list(table.column_names)
    with _loading(given):
        return list(next(iter(table), {}))


def _spooled(stream: Any, rows: int, given: str) -> Any:
    """The first rows of a stream as a table, kept in the cache of `datasets`: later steps read them again.

    The cache knows a stream by its files and when they changed.
    """
    import datasets

    with _loading(given):
        return datasets.Dataset.from_generator(
            _first_rows, features=stream.features, gen_kwargs={"stream": stream, "rows": rows}
        )


def _first_rows(stream: Any, rows: int) -> Iterator[dict[str, Any]]:
    for row in stream.take(rows):
        yield {name: _fetched(cell) for name, cell in row.items()}


def _fetched(cell: Any) -> Any:
    """An image that a stream left where it is, in an archive or on the hub, with its bytes."""
    if isinstance(cell, list):
        return [_fetched(item) for item in cell]
    if not (isinstance(cell, dict) and cell.get("bytes") is None and "://" in str(cell.get("path"))):
        return cell
    with fsspec.open(cell["path"]) as file:
        return {"bytes": file.read(), "path": cell["path"].partition("::")[0].rpartition("/")[2]}


def _is_empty(cell: Any) -> bool:
    if isinstance(cell, dict):
        return cell.get("bytes") is None and not cell.get("path")
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))
