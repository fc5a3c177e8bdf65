"""`merge`: profiles of separate jobs, joined."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from schedule_finder.cli.runner import command, command_line
from schedule_finder.cli.session import open_run
from schedule_finder.cli.terminal import screen
from schedule_finder.run.folder import Run


@command
def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the joined run.")],
) -> dict[str, Any]:
    """Join the profiles of separate jobs on one data set into one run.

    adaptinfer-profile merge outputs/job0 outputs/job1 --out outputs/both
    """
    from schedule_finder.run.merging import merge_runs

    joined = Run(out)
    counts = merge_runs([open_run(folder) for folder in folders], joined, command_line())
    screen.print(f"profile: {joined.profile.folder}, {counts['done']} samples", soft_wrap=True)
    return {"run": str(out), **counts}
