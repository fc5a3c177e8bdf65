"""Writing files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schedule_finder.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which becomes ``path`` in one step when the body ends well.

    What was written is on the disk before it gets its name, so that neither a killed process nor a machine
    that loses power leaves half a file under it. Makes the folder where it is missing. Raises `InputError`
    where nothing can be written.
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
    """Turn what the disk refuses (full, read-only, no such folder) into an `InputError` that names it."""
    try:
        yield
    except OSError as error:
        # pyarrow puts the system's words into a message of its own.
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise InputError(
            f"{path}: cannot be written ({reason}); what was done before is kept: make room or choose another "
            "--out, and give the same command again"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 in one step; makes the folder where it is missing."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
