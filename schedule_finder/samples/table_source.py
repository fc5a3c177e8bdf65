"""Opening of tables with the `datasets` library: hub names, local files and folders, presets of either."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from schedule_finder.errors import InputError
from schedule_finder.hub import cache_only, hub_reachable
from schedule_finder.samples.presets import Preset, presets

FRAMES = 8
"""Frames of each video."""
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".tar": ("webdataset", {}),
}
_NO_ROWS = (b"null", b"NaN", b"Infinity", b"-Infinity")
"""Lines of JSON lines that are no objects and that the reader does not refuse itself."""
_SPLITS = ("test", "validation", "val", "dev", "train")
"""Order in which splits are preferred where the user named none."""


@dataclass(frozen=True)
class DataOptions:
    """The user's options for a data set; None: guessed, or taken from the preset.

    ``image_column`` and ``video_column`` are a column, several with commas between, or a template of a path over
    columns (``videos/{video_id}.mp4``). ``frames``: frames of each video. ``allow_outside_paths``: read media that lie
    outside the data set's folder.
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
    allow_outside_paths: bool = False


def resolve_source(given: str) -> tuple[str | None, Preset | None, str]:
    """``(name of the preset, preset, location of the data)``."""
    name, _, location = given.partition("=")
    known = presets()
    if location and not Path(given).exists():
        if name.lower() not in known:
            raise InputError(f"data set {given!r}: {name!r} is no preset; choose {', '.join(known)}")
        return name.lower(), known[name.lower()], location
    if given.lower() in known and not Path(given).exists():
        preset = known[given.lower()]
        if preset.hub is None:
            raise InputError(
                f"data set {given!r}: no hub copy of {preset.title} with its videos is known; give a local copy, "
                f"{given}=FILE, with the columns {', '.join(preset.columns)}"
            )
        return given.lower(), preset, preset.hub
    return None, None, given


def open_table(location: str, preset: Preset | None, options: DataOptions) -> tuple[Any, Path | None, str]:
    """``(table, folder of relative paths (None on the hub), split)``."""
    path = Path(location).expanduser()
    if "://" in location:
        raise InputError(
            f"data set {location!r} is a URL; download it and give the local file, or give a hub name"
        )
    local = path.exists() or location.startswith((".", "/", "~")) or path.suffix in FORMATS
    if local and not path.exists():
        raise InputError(f"data set {location!r}: no such file")
    if path.is_file():
        if path.suffix not in FORMATS:
            raise InputError(f"data set {location!r}: {path.suffix!r} is none of {', '.join(FORMATS)}")
        return _load_file(path, options.streaming), path.parent, "train"
    location = str(path) if local else location
    offline = not local and not hub_reachable()
    for file in path.rglob("*.json*") if local else ():
        _check_json_rows(file)
    with loading(location), cache_only() if offline else nullcontext():
        config, split = _config_and_split(location, preset, options)
        return load_table(location, config, split, options.streaming), path if local else None, split


@contextmanager
def loading(location: str) -> Iterator[None]:
    """Turn every error of the `datasets` readers, which have many types, into an `InputError`."""
    import datasets

    datasets.disable_progress_bars()
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        lines = str(error.__cause__ or error).strip().splitlines()
        raise InputError(
            f"data set {location!r} cannot be read: {lines[0] if lines else 'it holds no rows'} (known: `demo`, "
            f"`demo-video`, `photo`, a local {', '.join(FORMATS)} file or folder, a preset, or a hub name that can be "
            "reached)"
        ) from error


def _load_file(path: Path, streaming: bool) -> Any:
    import datasets

    with loading(str(path)):
        reader, options = FORMATS[path.suffix]
        if reader == "json":
            _check_json_rows(path)
        elif reader == "csv":
            options = options | _as_text(path, options.get("sep", ","))
        return datasets.load_dataset(
            reader, data_files=str(path), split="train", streaming=streaming, **options
        )


def _as_text(path: Path, separator: str) -> dict[str, Any]:
    """Options that make the CSV reader keep every cell as it is written; only an empty one is missing.

    By itself it would guess types: 007 becomes 7, and with one empty cell in the column, 2 becomes 2.0.
    """
    import datasets
    import pandas as pd

    names = list(pd.read_csv(path, sep=separator, nrows=0).columns)
    if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), None)):
        raise InputError(
            f"data set {str(path)!r}: its columns are separated by {other!r}; save it with commas (.csv) or tabs (.tsv)"
        )
    features = datasets.Features({str(name): datasets.Value("string") for name in names})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def _check_json_rows(path: Path) -> None:
    """Raise `InputError` for rows that crash the reader: pyarrow does not survive blocks of lines that begin with null.

    The reader writes NaN, Infinity and whatever is no object in an array as null.
    """
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line.lstrip().startswith(b"["):
                _check_json_array(path)
                return
            if line.strip() in _NO_ROWS:
                raise InputError(
                    f"{path}: line {number} is {line.strip().decode()}, not an object with columns; remove the line"
                )


def _check_json_array(path: Path) -> None:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError:
        return  # the reader says what is wrong
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}: entry {number} is {row!r:.40}, not an object with columns; remove it")


def load_table(location: str, config: str | None, split: str, streaming: bool) -> Any:
    """Load a hub data set, a local folder with the same layout, or one that `datasets` saved."""
    import datasets

    if _saved_by_datasets(location):
        saved = datasets.load_from_disk(location)
        return saved[split] if isinstance(saved, dict) else saved
    return datasets.load_dataset(location, config, split=split, streaming=streaming)


def _saved_by_datasets(location: str) -> bool:
    return any((Path(location) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _config_and_split(location: str, preset: Preset | None, options: DataOptions) -> tuple[str | None, str]:
    """Config and split: from the options, else the preset (where the data set has it), else a guess."""
    import datasets

    config = options.config
    if _saved_by_datasets(location):
        saved = datasets.load_from_disk(location)
        splits = list(saved) if isinstance(saved, dict) else ["train"]
    else:
        configs = datasets.get_dataset_config_names(location)
        if config is None:
            config = preset.config if preset and preset.config in configs else None
        if (config is None and len(configs) > 1 and "default" not in configs) or (
            config is not None and config not in configs
        ):
            raise InputError(
                f"data set {location!r} has the configs {', '.join(configs)}; choose one with --dataset-config"
            )
        splits = datasets.get_dataset_split_names(location, config)
    if options.split:
        if options.split.partition("[")[0] not in splits:  # `test[:500]` is a split too
            raise InputError(
                f"--split {options.split!r}: data set {location!r} has the splits {', '.join(splits)}"
            )
        return config, options.split
    preferred = ((preset.split or "") if preset else "", *_SPLITS)
    return config, next((name for name in preferred if name in splits), splits[0])


def undecoded(table: Any) -> Any:
    """The table with undecoded images and videos, so that an unreadable one affects its own row only."""
    import datasets

    for name, feature in (table.features or {}).items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, (datasets.Image, datasets.Video)):
            raw = type(inner)(decode=False)
            table = table.cast_column(name, raw if inner is feature else datasets.List(raw))
    return table


def expanded(table: Any) -> Any:
    """The table with the fields of a webdataset's ``json`` files as columns, except those that are there already."""
    fields = (table.features or {}).get("json")
    if not isinstance(fields, dict):
        return table
    names = [name for name in fields if name not in table.features]
    features = {name: feature for name, feature in table.features.items() if name != "json"}
    features |= {name: fields[name] for name in names}
    import datasets

    return table.map(
        lambda row: {name: (row["json"] or {}).get(name) for name in names},
        remove_columns=["json"],
        features=datasets.Features(features),
    )


def column_names(table: Any, given: str) -> list[str]:
    """Column names; for a stream of JSON lines they come from its first row."""
    if table.column_names is not None:
        return list(table.column_names)
    with loading(given):
        return list(next(iter(table), {}))


def spooled(stream: Any, rows: int, given: str) -> Any:
    """The first rows of a stream as a table, kept in the cache of `datasets` for the later steps.

    The cache key holds the stream's files and their modification times.
    """
    import datasets

    with loading(given):
        return datasets.Dataset.from_generator(
            _first_rows, features=stream.features, gen_kwargs={"stream": stream, "rows": rows}
        )


def _first_rows(stream: Any, rows: int) -> Iterator[dict[str, Any]]:
    for row in stream.take(rows):
        yield {name: _fetched(cell) for name, cell in row.items()}


def _fetched(cell: Any) -> Any:
    """The cell, with the bytes of an image that a stream only refers to, in an archive or on the hub."""
    if isinstance(cell, list):
        return [_fetched(item) for item in cell]
    if not (isinstance(cell, dict) and cell.get("bytes") is None and "://" in str(cell.get("path"))):
        return cell
    with fsspec.open(cell["path"]) as file:
        return {"bytes": file.read(), "path": cell["path"].partition("::")[0].rpartition("/")[2]}
