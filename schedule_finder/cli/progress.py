"""Progress on stderr: status lines, bars with the time left, and notes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

notes = Console(stderr=True)


def note(line: str) -> None:
    """Print one line."""
    notes.print(escape(line), soft_wrap=True)


@contextmanager
def status(what: str) -> Iterator[None]:
    """Show ``what`` while the body runs."""
    with notes.status(what):
        yield


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function that takes (done, total); the bar appears with its first call."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=notes,
    )
    tasks: list[TaskID] = []

    def show(done: int, total: int) -> None:
        if (
            not tasks
        ):  # a solver that measures nothing shows no bar, and an error before the first call no empty line
            bar.start()
            tasks.append(bar.add_task(what, total=total))
        bar.update(tasks[0], completed=done, total=total)

    try:
        yield show
    finally:
        if tasks:
            bar.stop()
