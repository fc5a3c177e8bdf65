"""The commands, run in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from schedule_finder.cli.commands import app

runner = CliRunner()


def call(*arguments: Any, code: int = 0) -> Any:
    """Run a command with ``--json``; the document on its last line, or its one line of error."""
    result = runner.invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == code, result.output + result.stderr
    if code == 0:
        return json.loads(result.stdout.strip().splitlines()[-1])
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(("error:", "failed:"))]
    return line


def output_of(*arguments: object, code: int = 0) -> str:
    """What a command prints, on a wide terminal."""
    result = runner.invoke(app, [*map(str, arguments)], env={"COLUMNS": "300"})
    assert result.exit_code == code, result.output
    return result.output
