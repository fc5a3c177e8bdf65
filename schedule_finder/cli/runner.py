"""The application and the decorator that makes a function a command."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import typer
import typer.core
from rich.markup import escape

from pruning_runtime.errors import PruningError, ScheduleError, UnsupportedBackbone
from schedule_finder.cli.options import DATA_OPTIONS, LOADING_OPTIONS, Debug, Json, Residual, Version
from schedule_finder.cli.progress import notes
from schedule_finder.errors import AdaptInferError
from schedule_finder.library_messages import library_messages_off

if TYPE_CHECKING:
    from collections.abc import Callable

_GROUPS = {"columns": DATA_OPTIONS, "loading": LOADING_OPTIONS}
"""Parameters of commands that stand for several options."""


class Commands(typer.core.TyperGroup):
    """The group of all commands; an error in an option is one line, as every other error."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run a command and exit: 0, 2 for bad input, 1 for a failure, 130 where it was interrupted."""
        if not standalone_mode:
            return super().main(*args, **kwargs | {"standalone_mode": False})
        try:
            code = super().main(*args, **kwargs | {"standalone_mode": False})
        except typer.Abort:
            code = _INTERRUPTED
        except Exception as error:
            # typer's usage errors; where its classes are differs between versions
            if not hasattr(error, "format_message"):
                raise
            code = _report_usage(error)
        if code == _INTERRUPTED:
            notes.print("interrupted; a run goes on with the same command")
        sys.exit(code if isinstance(code, int) else 0)


_INTERRUPTED = 130
MOST_NAME = 200
"""Characters of a path in an error."""

app = typer.Typer(
    cls=Commands,
    help="Find out which layers of a vision-language model need its vision tokens, and prune the others' tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _application(version: Version = False) -> None:
    """Options of the program itself; they are handled by their callbacks."""


def command(function: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Register ``function`` as a command that prints an error as one line and, with --json, its result.

    The exit code is 2 for bad input and 1 for a failure, or where the result has a true ``failed``. A parameter
    ``columns`` stands for all `DATA_OPTIONS`, ``loading`` for all `LOADING_OPTIONS`; a parameter ``dropped_tokens``
    also accepts the hidden old option ``--residual``.
    """
    own = inspect.signature(function, eval_str=True).parameters
    added: dict[str, tuple[Any, Any]] = {"json_output": (Json, False), "debug": (Debug, False)}
    groups = {name: group for name, group in _GROUPS.items() if name in own}
    for group in groups.values():
        added = {name: (kind, None) for name, kind in group.items()} | added
    if "dropped_tokens" in own:
        added["residual"] = (Residual, None)

    @functools.wraps(function)
    def guarded(
        *args: Any, json_output: bool, debug: bool, residual: str | None = None, **kwargs: Any
    ) -> None:
        for name, group in groups.items():
            kwargs[name] = {option: kwargs.pop(option) for option in group}
        if residual is not None:
            kwargs["dropped_tokens"] = residual
        try:
            with nullcontext() if debug else library_messages_off():
                result = function(*args, **kwargs)
        except Exception as error:
            if debug:
                raise
            raise SystemExit(_report(error)) from None
        if json_output:
            sys.stdout.write(json.dumps(result) + "\n")
        if result.get("failed"):
            raise SystemExit(1)

    parameters = [parameter for name, parameter in own.items() if name not in groups]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in added.items()
    ]
    guarded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    guarded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command()(guarded)
    return guarded


def _report_usage(error: Any) -> int:
    """Print an error in the options as one line; returns the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    context = getattr(error, "ctx", None)
    command_name = context.command_path.partition(" ")[2] if context is not None else ""
    usage = f" (see adaptinfer-profile {command_name} --help)".replace("  ", " ")
    line = " ".join(error.format_message().split())
    notes.print(f"[red]error:[/red] {escape(line + usage)}", soft_wrap=True)
    return 2


def _report(error: Exception) -> int:
    """Print ``error`` as one line; returns the exit code."""
    line = escape(" ".join((_about_file(error) or str(error)).split()))
    if _is_bad_input(error):
        notes.print(f"[red]error:[/red] {line}", soft_wrap=True)
        return 2
    notes.print(
        f"[red]failed:[/red] {type(error).__name__}: {line} (--debug shows the traceback)", soft_wrap=True
    )
    return 1


def _is_bad_input(error: Exception) -> bool:
    known = (AdaptInferError, ScheduleError, UnsupportedBackbone, PruningError)
    return isinstance(error, known) or _about_file(error) is not None


def _about_file(error: Exception) -> str | None:
    """The line about a path that cannot be used: a folder where a file belongs, no permission, too long a name.

    None for any other error.
    """
    if not isinstance(error, OSError) or error.filename is None or not error.strerror:
        return None
    path = error.filename2 if error.filename2 is not None else error.filename
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else str(path)
    shown = name if len(name) <= MOST_NAME else f"{name[:MOST_NAME]}..."
    return f"{shown}: {error.strerror}; check what is there, or give another path"


def command_line() -> str:
    """The command as it was typed."""
    return f"adaptinfer-profile {' '.join(sys.argv[1:])}"
