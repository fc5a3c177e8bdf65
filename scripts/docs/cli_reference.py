"""The command-line reference as Markdown, made from the commands themselves: `python -m scripts.docs.cli_reference`."""

from __future__ import annotations

import inspect
from typing import Any

import typer

from schedule_finder.cli.commands import app

HEAD = """# Command line

Made from the commands themselves. Every command takes `--json` (one JSON document as the last line of stdout) and `--debug`
(traceback of an error). Exit codes: 0, 2 for bad input, 1 for a failure.
"""


def reference() -> str:
    """All commands with their arguments and options."""
    group: Any = typer.main.get_command(app)
    parts = [_command(name, one) for name, one in group.commands.items() if not one.hidden]
    return "\n".join([HEAD, *parts])


def _command(name: str, command: Any) -> str:
    text, examples = _split(inspect.cleandoc(command.help or ""))
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    usage = " ".join(["adaptinfer-profile", name, *(_shown(one) for one in arguments), "[OPTIONS]"])
    lines = [f"## {name}", "", text, "", "```", usage, "```", ""]
    if examples:
        lines += ["Examples:", "", "```", *examples, "```", ""]
    lines += ["| option | meaning | default |", "|---|---|---|"]
    for option in command.params:
        if (
            option.param_type_name == "option"
            and not option.hidden
            and option.name not in ("json_output", "debug")
        ):
            names = ", ".join(f"`{one}`" for one in (*option.opts, *option.secondary_opts))
            lines.append(f"| {names} | {_cell(option.help or '')} | {_default(option)} |")
    for argument in arguments:
        lines.append(f"| {_cell(_shown(argument))} | {_cell(argument.help or '')} | {_default(argument)} |")
    return "\n".join([*lines, ""])


def _split(text: str) -> tuple[str, list[str]]:
    """The description, and the example commands in it."""
    lines = [line.strip() for line in text.splitlines()]
    examples = [line for line in lines if line.startswith("adaptinfer-profile ")]
    return "\n".join(line for line in lines if line not in examples).strip(), examples


def _shown(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(parameter: Any) -> str:
    value = parameter.default
    if value is None or value is False or parameter.required:
        return ""
    return f"`{value}`"


if __name__ == "__main__":
    print(reference())
