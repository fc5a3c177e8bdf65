"""The Python interface: the steps of `adaptinfer-profile` on a run folder, with tables as DataFrames.

A run made here and one made by the command line are the same files; each continues the other.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pruning_runtime.display import html_table
from pruning_runtime.schedule import BudgetKind, Schedule
from schedule_finder.errors import InputError
from schedule_finder.run.folder import Run as RunFolder
from schedule_finder.run.output_folder import check_folder, check_not_among_data
from schedule_finder.run.schema import RUN_OPTIONS, missing_fields

if TYPE_CHECKING:
    import pandas as pd

    from schedule_finder.models.loading import LoadedBackbone
    from schedule_finder.profiling.store import Profile
    from schedule_finder.run.reader import ChangePoints
    from schedule_finder.samples import DataSet

log = logging.getLogger("adaptinfer")

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


def _silent(_done: int, _total: int) -> None:
    pass


def load_run(folder: str | os.PathLike[str], *, device: str = "auto", dtype: str = "auto") -> Run:
    """The run in ``folder``, made here or by the command line.

    Args:
        folder: of the run.
        device, dtype: for steps that need the backbone, which is loaded when the first of them runs.

    Raises:
        InputError: there is no run.
    """
    files = RunFolder(Path(folder))
    if (problem := missing_fields(files.options, RUN_OPTIONS)) is not None:
        raise InputError(f"{files.path}: options: {problem}; restore it or begin a new run")
    return Run(files, device, dtype)


def profile(
    backbone: str,
    dataset: str | Sequence[str] | None = None,
    *,
    out: str | os.PathLike[str],
    samples: int = 1000,
    eval_samples: int = 450,
    seed: int = 0,
    batch_size: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = _silent,
    **columns: Any,
) -> Run:
    """Steps 1 and 2: choose samples and record the attention to their vision tokens. Continues an interrupted run.

    Args:
        backbone: ``demo``, a checkpoint folder or a hub name.
        dataset: as ``--dataset`` of the command line; several are mixed. None: ``demo``, for the demo backbone only.
        out: folder of the run.
        samples: to profile.
        eval_samples: to hold out for `Run.evaluate`.
        seed: of the choice of samples and of all resampling.
        batch_size: most samples in a forward pass.
        device, dtype: of the backbone.
        progress: called with the samples done and all samples.
        columns: how a table is read: `schedule_finder.samples.DataOptions`.

    Raises:
        InputError: something given cannot be used; nothing was written.
    """
    from schedule_finder import pipeline
    from schedule_finder.models.loading import load_backbone
    from schedule_finder.profiling.engines.base import BatchLimits
    from schedule_finder.profiling.engines.local import LocalEngine
    from schedule_finder.samples import open_data

    sources = _sources(backbone, dataset)
    folder = Path(out)
    check_folder(folder)
    check_not_among_data(folder, sources)
    always = ("split", "image_column", "question_column", "answer_column")
    reading: dict[str, Any] = dict.fromkeys(always) | columns
    options = {
        "backbone": backbone,
        "dataset": sources[0] if len(sources) == 1 else sources,
        "samples": samples,
        "eval_samples": eval_samples,
        "seed": seed,
        "columns": reading,
    }
    data = open_data(sources, seed=seed, **reading)
    loaded = load_backbone(backbone, device=device, dtype=dtype)
    command = f"schedule_finder.profile({backbone!r}, {dataset!r}, out={os.fspath(out)!r})"
    files = RunFolder.begin(folder, command, options)
    with LocalEngine(loaded, data, BatchLimits(samples=batch_size)) as engine:
        pipeline.profile_step(files, engine, data, progress, report=log.warning)
    run = Run(files, device, dtype)
    run.__dict__["model"] = loaded, data  # loaded already
    return run


def find_schedule(
    backbone: str,
    dataset: str | Sequence[str] | None = None,
    *,
    out: str | os.PathLike[str],
    budget: float = 0.35,
    kind: BudgetKind = "processed",
    solver: str = "sensitivity",
    scorer: str = "auto",
    dropped_tokens: str = "auto",
    **options: Any,
) -> Schedule:
    """Steps 1 to 4: profile, detect change points, search. See `profile`, `Run.detect` and `Run.search`.

    ``options`` are those of `profile`. The run is in ``out``: `load_run` opens it for the evaluation.
    """
    run = profile(backbone, dataset, out=out, **options)
    run.detect()
    return run.search(budget, kind=kind, solver=solver, scorer=scorer, dropped_tokens=dropped_tokens)


class Run:
    """A run folder with its steps as methods and its files as tables. Made by `load_run` and `profile`."""

    def __init__(self, files: RunFolder, device: str = "auto", dtype: str = "auto") -> None:
        self.files = files
        self._device, self._dtype = device, dtype

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.files.folder

    @property
    def options(self) -> dict[str, Any]:
        """Backbone, data set and numbers of samples, as the run was begun."""
        return self.files.options

    @cached_property
    def model(self) -> tuple[LoadedBackbone, DataSet]:
        """Backbone and data set, loaded on first use. Raises `InputError` where one of them is gone or has changed."""
        from schedule_finder.models.load_options import LoadOptions
        from schedule_finder.models.loading import load_backbone
        from schedule_finder.samples import open_data

        options = self.options
        how = LoadOptions.of_run(options.get("loading", {}))
        data = open_data(options["dataset"], seed=options["seed"], **options["columns"])
        loaded = load_backbone(options["backbone"], device=self._device, dtype=self._dtype, options=how)
        self.files.profile.check_backbone(loaded.identity.model_dump(), log.warning)
        return loaded, data

    # ---- steps

    def detect(self, detector: str | None = None) -> pd.DataFrame:
        """Step 3: change points by every detector; ``detector`` is the one that schedules follow. See `change_points`."""
        from schedule_finder import pipeline

        pipeline.detect_step(self.files, detector)
        return self.change_points

    def search(
        self,
        budget: float = 0.35,
        *,
        kind: BudgetKind = "processed",
        solver: str = "sensitivity",
        scorer: str = "auto",
        dropped_tokens: str = "auto",
        name: str | None = None,
        use_model: bool = True,
        batch_size: int = 32,
        progress: Progress = _silent,
    ) -> Schedule:
        """Step 4: a schedule for a budget. It is kept in the run under ``name`` and selected.

        Args:
            budget: fraction of the unpruned cost, above 0 and at most 1.
            kind: unit of the budget: processed, published, flops, kv or latency.
            solver, scorer, dropped_tokens: as the options of ``adaptinfer-profile schedule``.
            name: of the result; None: made from budget, kind and solver.
            use_model: measure on the backbone; False: use stored measurements only.
            batch_size: samples in a forward pass.
            progress: called with the measurements done and all of them.

        Raises:
            InputError: something given cannot be used, or the budget cannot be met.
        """
        from schedule_finder import pipeline
        from schedule_finder.search import Search
        from schedule_finder.solvers import SOLVERS

        _check_choice("solver", solver, SOLVERS)
        _check_choice("kind", kind, get_args(BudgetKind))
        if not 0 < budget <= 1:
            raise InputError(f"budget {budget}: must be above 0 and at most 1")
        measures = use_model and (SOLVERS[solver].measures or kind == "latency")
        search = Search(
            self.files, self.model if measures else None, batch_size=batch_size, progress=progress
        )
        asked = {"solver": solver, "scorer": scorer, "dropped_tokens": dropped_tokens}
        return pipeline.schedule_step(
            self.files, search, budget=budget, kind=kind, name=name, **asked
        ).schedule

    def evaluate(
        self,
        *,
        schedules: Sequence[str] = (),
        baselines: Sequence[str] | str | None = None,
        eval_samples: int | None = None,
        max_new_tokens: int = 16,
        metric: str | None = None,
        batch_size: int = 32,
        progress: Progress = _silent,
    ) -> pd.DataFrame:
        """Step 5: schedules and baselines against the full model on held-out samples; returns `evaluation`.

        Args:
            schedules: names of the run's schedules, or files; none: the selected one.
            baselines: names, ``"all"`` or ``"none"``; None: three of them.
            eval_samples: use the first held-out samples only; None: all.
            max_new_tokens: longest answer.
            metric: how answers are judged; None: that of the run or of the data set.
            batch_size: samples in a forward pass.
            progress: called with the answers done and all answers.
        """
        from schedule_finder import pipeline
        from schedule_finder.evaluation.metrics import METRICS

        if metric is not None:
            _check_choice("metric", metric, METRICS)
        names = (
            baselines if baselines is None or isinstance(baselines, str) else ",".join(baselines) or "none"
        )
        loaded, data = self.model
        pipeline.evaluate_step(
            self.files,
            loaded,
            data,
            progress,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            baselines=names,
            report=log.info,
            schedules=self.files.schedules.several(schedules),
            most_samples=eval_samples,
            metric=metric,
        )
        return self.evaluation

    def figures(self) -> list[Path]:
        """Step 6: draw the figures that the run has data for; returns the files."""
        from schedule_finder.figures import make_figures

        with self.files.step("plot"):
            return make_figures(self.files, report=log.warning)

    def report(self, path: str | os.PathLike[str] | None = None, *, viewer: bool = True) -> Path:
        """Step 7: write one HTML file about the run and return its path.

        Args:
            path: of the file; None: ``report.html`` in the run's folder.
            viewer: record the viewer's samples with the backbone where that is not done yet.
        """
        from schedule_finder import pipeline
        from schedule_finder.report import check_packages, write_report
        from schedule_finder.report.viewer import current_viewer

        check_packages()
        selected = self.files.schedules.selected()
        known = selected is not None and current_viewer(self.files, selected.digest) is not None
        if viewer and selected is not None and self.files.answers.exists() and not known:
            pipeline.viewer_step(self.files, *self.model, _silent)
        return write_report([self.files], self.files.report if path is None else Path(path))

    # ---- files

    @property
    def profile(self) -> Profile:
        """The attention profile; `Profile.to_pandas` makes a table of it."""
        return self.files.profile.read()

    @property
    def samples(self) -> pd.DataFrame:
        """The samples: ``id, source, row, use, question, answer, question_type, status, reason, references``."""
        import pandas as pd

        from schedule_finder.samples import read_entries

        return pd.DataFrame([vars(entry) for entry in read_entries(self.files.samples)])

    @property
    def detections(self) -> ChangePoints:
        """The result of `detect` whole."""
        from schedule_finder.run.reader import read_change_points

        return read_change_points(self.files.change_points)

    @property
    def change_points(self) -> pd.DataFrame:
        """One row per change point: ``detector, layer, followed``; schedules follow those of the default detector."""
        import pandas as pd

        found = self.detections
        rows = [
            (name, layer, name == found.default and layer in found.of())
            for name, one in found.detectors.items()
            for layer in one.change_points
        ]
        return pd.DataFrame(rows, columns=["detector", "layer", "followed"])

    @property
    def schedule(self) -> Schedule:
        """The selected schedule. Raises `ScheduleError` where there is none."""
        return Schedule.load(self.files.schedule)

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Every schedule of the run by name."""
        found = self.files.schedules
        return {name: found.find(name).schedule for name in found.names()}

    @property
    def sensitivity(self) -> pd.DataFrame:
        """Answer KL of single stages, one row per layer, keep ratio and sample. Raises `InputError` where not measured."""
        from schedule_finder.measuring.sensitivity_table import SensitivityTable

        return SensitivityTable.load(self.files.sensitivity).to_pandas()

    @property
    def evaluation(self) -> pd.DataFrame:
        """The evaluation, one row per method, budget and question type. Raises `InputError` where there is none."""
        import pandas as pd

        return pd.read_csv(_need(self.files.evaluation))

    @property
    def answers(self) -> pd.DataFrame:
        """Every answer of the evaluation, one row per method, draw and sample. Raises `InputError` where there is none."""
        import pandas as pd

        return pd.read_parquet(_need(self.files.answers))

    def __repr__(self) -> str:
        steps = self.files.document()["steps"]
        done = ", ".join(name for name, step in steps.items() if step["state"] == "done")
        return f"<Run {self.folder}: {self.options['backbone']}, {done or 'nothing done'}>"

    def _repr_html_(self) -> str:
        """A table of the steps, for notebooks."""
        steps = self.files.document()["steps"]
        rows = [(name, step["state"], step.get("seconds", "")) for name, step in steps.items()]
        options = self.options
        note = f"backbone {options['backbone']}, data set {options['dataset']}"
        return html_table(f"Run {self.folder}", ("Step", "State", "Seconds"), rows, note)


def _sources(backbone: str, dataset: str | Sequence[str] | None) -> list[str]:
    """The data sets as a list. Raises `InputError` where there is none for this backbone."""
    if dataset:
        return [dataset] if isinstance(dataset, str) else list(dataset)
    if backbone != "demo":
        raise InputError(
            f"backbone {backbone!r} needs a dataset (a .jsonl, .parquet or .csv file, a folder, a hub name, a preset)"
        )
    return ["demo"]


def _check_choice(what: str, given: str, known: Any) -> None:
    if given not in known:
        raise InputError(f"{what} {given!r}: choose {', '.join(known)}")


def _need(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path}: not there; call `evaluate` first")
    return path
