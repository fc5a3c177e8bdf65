"""`report`: one HTML file about a run, or about several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pruning_runtime.errors import PruningError, ScheduleError, UnsupportedBackbone
from schedule_finder.cli import options as opt
from schedule_finder.cli.progress import note
from schedule_finder.cli.runner import command
from schedule_finder.cli.session import load_again, open_run
from schedule_finder.cli.steps import note_stale, record_viewer, write_reports
from schedule_finder.cli.terminal import screen
from schedule_finder.errors import AdaptInferError, InputError
from schedule_finder.report import check_packages
from schedule_finder.report.viewer import current_viewer

if TYPE_CHECKING:
    from schedule_finder.run.folder import Run

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs; several are compared.")]
ReportFile = Annotated[
    Path | None,
    typer.Option("--out", help="The HTML file; default RUN/report.html. Needed for several runs."),
]
Viewer = Annotated[
    bool,
    typer.Option(
        "--model/--no-model", help="Load the backbone where the viewer's samples are not recorded yet."
    ),
]


@command
def report(
    folders: Runs,
    out: ReportFile = None,
    model: Viewer = True,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    threads: opt.Threads = None,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> dict[str, Any]:
    """Step 7: one HTML file with verdict, charts, tables and a viewer of samples; it needs no network.

    adaptinfer-profile report outputs/demo

    adaptinfer-profile report outputs/one outputs/other --out comparison.html
    """
    check_packages()
    runs = [open_run(folder) for folder in folders]
    if out is None and len(runs) > 1:
        raise InputError("several runs need --out, the HTML file to write")
    path = runs[0].report if out is None else out
    if path.is_dir():
        raise InputError(f"--out {path}: is a folder; give the HTML file")
    reasons: list[str | None] = []
    for run in runs:
        reasons.append(_without_viewer(run, model, device, dtype, threads, trust_remote_code))
        if reasons[-1] is not None:
            note(f"{run.folder}: the viewer is left out: {reasons[-1]}")
    write_reports(runs, path, reasons)
    stale = [one for run in runs for one in note_stale(run)]
    screen.print(f"report: [bold]{path}[/bold]", soft_wrap=True)
    viewers = [str(run.folder) for run, reason in zip(runs, reasons, strict=True) if reason is None]
    return {
        "report": str(path),
        "runs": [str(run.folder) for run in runs],
        "viewers": viewers,
        "stale": stale,
    }


def _without_viewer(
    run: Run, model: bool, device: str, dtype: str, threads: int | None, trust_remote_code: bool
) -> str | None:
    """Record the viewer's samples if that is needed; returns why there are none, or None."""
    selected = run.schedules.selected()
    if selected is None:
        return "there is no schedule"
    if current_viewer(run, selected.digest) is not None:
        return None
    if not model:
        return "its samples are not recorded, and --no-model was given"
    if not run.answers.exists():
        return f"there are no answers; run `adaptinfer-profile evaluate {run.folder}`"
    try:
        loaded, data = load_again(run, device, dtype, threads, trust_remote_code)
        record_viewer(run, loaded, data)
    except (AdaptInferError, PruningError, ScheduleError, UnsupportedBackbone) as error:
        return str(error)
    return None
