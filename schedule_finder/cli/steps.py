"""Steps of the pipeline with their progress bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schedule_finder.cli.names import AUTO
from schedule_finder.cli.progress import note, notes, progress_bar, status
from schedule_finder.cli.terminal import screen

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from schedule_finder.models.loading import LoadedBackbone
    from schedule_finder.profiling.engines.base import Engine
    from schedule_finder.run.folder import Run
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


def evaluate_schedule(
    run: Run,
    loaded: LoadedBackbone,
    data: DataSet,
    *,
    batch_size: int,
    max_new_tokens: int,
    baselines: str | None,
    sweep: bool,
) -> pd.DataFrame:
    """Step 5; returns its table."""
    from schedule_finder import pipeline
    from schedule_finder.evaluation.methods import SWEEP

    with progress_bar("evaluate") as progress:
        return pipeline.evaluate_step(
            run,
            loaded,
            data,
            progress,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            baselines=baselines,
            sweep=SWEEP if sweep else (),
            report=note,
        )


def draw_figures(run: Run) -> list[Path]:
    """Step 6; returns the files written."""
    from schedule_finder import figures

    with run.step("plot"), status("drawing"):
        return figures.make_figures(run)
