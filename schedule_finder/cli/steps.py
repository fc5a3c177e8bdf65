"""Steps of the pipeline with their progress bars."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from schedule_finder.cli.names import AUTO
from schedule_finder.cli.progress import note, notes, progress_bar, status
from schedule_finder.cli.terminal import screen
from schedule_finder.run.stale import find_stale

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd

    from schedule_finder.models.loading import LoadedBackbone
    from schedule_finder.profiling.engines.base import Engine
    from schedule_finder.run.folder import Run
    from schedule_finder.run.schedules import NamedSchedule
    from schedule_finder.samples import DataSet


def profile_samples(run: Run, engine: Engine, data: DataSet, max_skipped: float) -> dict[str, Any]:
    """Steps 1 and 2; returns the counts by status."""
    from schedule_finder import pipeline
    from schedule_finder.profiling.convergence import Convergence

    until_converged = run.options["samples"] == AUTO
    convergence = Convergence(run.convergence, seed=run.options["seed"]) if until_converged else None
    with progress_bar("profile") as progress:
        counts = pipeline.profile_step(
            run,
            engine,
            data,
            progress,
            report=note,
            max_skipped=max_skipped,
            after_shard=convergence,
        )
    if convergence is not None:
        screen.print(f"stopped after {convergence}", soft_wrap=True)
    if counts["skipped"]:
        notes.print(
            f"{counts['skipped']} sample(s) skipped; the reasons are in {run.samples}", soft_wrap=True
        )
    return counts


def ask_first(run: Run, loaded: LoadedBackbone, data: DataSet, batch_size: int, max_new_tokens: int) -> None:
    """A few answers of the full model, and a warning where they are suspicious."""
    from schedule_finder import pipeline

    with status("asking the full model"):
        pipeline.first_answers_step(
            run, loaded, data, batch_size=batch_size, max_new_tokens=max_new_tokens, report=note
        )


def evaluate_schedule(
    run: Run,
    loaded: LoadedBackbone,
    data: DataSet,
    *,
    batch_size: int,
    max_new_tokens: int,
    baselines: str | None,
    sweep: bool,
    schedules: Sequence[NamedSchedule] = (),
    most_samples: int | None = None,
    metric: str | None = None,
    max_skipped: float,
) -> pd.DataFrame:
    """Step 5; returns its table."""
    from schedule_finder import pipeline
    from schedule_finder.evaluation.methods import SMALLER_IMAGES, SWEEP

    with progress_bar("evaluate") as progress:
        table = pipeline.evaluate_step(
            run,
            loaded,
            data,
            progress,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            baselines=baselines,
            sweep=SWEEP if sweep else (),
            report=note,
            schedules=schedules,
            most_samples=most_samples,
            metric=metric,
            max_skipped=max_skipped,
        )
    if "smaller-images" in (baselines or "").split(",") and SMALLER_IMAGES not in set(table.method):
        note("smaller-images: skipped, and the hard subset; this backbone makes as many tokens of any image")
    return table


def draw_figures(run: Run, **look: Any) -> list[Path]:
    """Step 6; returns the files written. ``look``: see `make_figures`."""
    from schedule_finder import figures

    with run.step("plot"), status("drawing"):
        return figures.make_figures(run, report=note, **look)


def record_viewer(run: Run, loaded: LoadedBackbone, data: DataSet) -> None:
    """The samples of the report's viewer."""
    from schedule_finder import pipeline

    with progress_bar("viewer") as progress:
        pipeline.viewer_step(run, loaded, data, progress)


def write_reports(runs: Sequence[Run], path: Path, reasons: Sequence[str | None] | None = None) -> Path:
    """Step 7: the report; returns its path."""
    from schedule_finder.report import write_report

    with status("writing the report"):
        return write_report(runs, path, reasons)


def note_stale(run: Run) -> list[dict[str, Any]]:
    """Print a line about everything that belongs to another schedule; returns it for ``--json``."""
    found = find_stale(run)
    for stale in found:
        note(str(stale))
    return [asdict(stale) for stale in found]
