"""JSON of run folders, and atomic writes: a reader sees the old file or the new one, never a part of one."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from schedule_finder.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces ``path`` when the body ends without an exception.

    The content is flushed to the disk before it gets its name, so that neither a killed process nor a power
    failure leaves a part of a file. Makes the folder if needed. Raises `InputError` where nothing can be written.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the body (disk full, read-only, no such folder) into an `InputError` that names ``path``."""
    try:
        yield
    except OSError as error:
        # pyarrow puts the system's words into a message of its own.
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise InputError(
            f"{path}: cannot be written ({reason}); finished work is kept: make room or choose another --out, and "
            "run the same command again"
        ) from error


def refuse_folders(*results: Path) -> None:
    """Raise `InputError` for a folder in the place of a file that a step will write: before its work, not after it."""
    for path in results:
        if path.is_dir():
            raise InputError(
                f"{path}: is a folder, a result belongs there; remove it or choose another --out"
            )


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 in one step; makes the folder if needed."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Write ``document`` as indented JSON in one step."""
    write_text(path, json.dumps(document, indent=2) + "\n")


def parse_json(text: str) -> Any:
    """The JSON document. Raises ValueError, also for half of a surrogate pair: no file can hold such text."""
    document = json.loads(text)
    json.dumps(document, ensure_ascii=False).encode()
    return document
