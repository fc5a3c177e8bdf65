"""The application and the decorator that makes a function a command."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from pruning_runtime.errors import PruningError, ScheduleError, UnsupportedBackbone
from schedule_finder.cli.options import DATA_OPTIONS, Debug, Json, Residual
from schedule_finder.cli.progress import notes
from schedule_finder.errors import AdaptInferError

if TYPE_CHECKING:
    from collections.abc import Callable

app = typer.Typer(
    help="Find out which layers of a vision-language model need its vision tokens, and prune the others' tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def command(function: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Register ``function`` as a command that prints an error as one line and, with --json, its result.

    The exit code is 2 for bad input and 1 for a failure. A parameter ``columns`` stands for all `DATA_OPTIONS`; a
    parameter ``dropped_tokens`` also accepts the hidden old option ``--residual``.
    """
    own = inspect.signature(function, eval_str=True).parameters
    added: dict[str, tuple[Any, Any]] = {"json_output": (Json, False), "debug": (Debug, False)}
    if "columns" in own:
        added = {name: (kind, None) for name, kind in DATA_OPTIONS.items()} | added
    if "dropped_tokens" in own:
        added["residual"] = (Residual, None)

    @functools.wraps(function)
    def guarded(
        *args: Any, json_output: bool, debug: bool, residual: str | None = None, **kwargs: Any
    ) -> None:
        if "columns" in own:
            kwargs["columns"] = {name: kwargs.pop(name) for name in DATA_OPTIONS}
        if residual is not None:
            kwargs["dropped_tokens"] = residual
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            if debug:
                raise
            raise SystemExit(_report(error)) from None
        if json_output:
            sys.stdout.write(json.dumps(result) + "\n")

    parameters = [parameter for name, parameter in own.items() if name != "columns"]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in added.items()
    ]
    guarded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    guarded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command()(guarded)
    return guarded


def _report(error: Exception) -> int:
    """Print ``error`` as one line; returns the exit code."""
    line = escape(" ".join(str(error).split()))
    if _is_bad_input(error):
        notes.print(f"[red]error:[/red] {line}", soft_wrap=True)
        return 2
    notes.print(
        f"[red]failed:[/red] {type(error).__name__}: {line} (--debug shows the traceback)", soft_wrap=True
    )
    return 1


def _is_bad_input(error: Exception) -> bool:
    return isinstance(error, (AdaptInferError, ScheduleError, UnsupportedBackbone, PruningError))


def command_line() -> str:
    """The command as it was typed."""
    return f"adaptinfer-profile {' '.join(sys.argv[1:])}"
