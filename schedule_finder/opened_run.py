"""A run folder in Python: its steps as methods, its files as tables. `schedule_finder.load_run` and `profile` make one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pruning_runtime.display import html_table
from pruning_runtime.schedule import BudgetKind, Schedule
from schedule_finder.errors import InputError
from schedule_finder.run.folder import Run as RunFolder

if TYPE_CHECKING:
    import pandas as pd

    from schedule_finder.models.loading import LoadedBackbone
    from schedule_finder.profiling.store import Profile
    from schedule_finder.run.reader import ChangePoints
    from schedule_finder.samples import DataSet, Sample

log = logging.getLogger("adaptinfer")

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


def silent(_done: int, _total: int) -> None:
    """Shows no progress."""


class Run:
    """A run folder with its steps as methods and its files as tables. Made by `load_run` and `profile`.

    Steps write the same files as the commands of the same names. Tables are read from the files each time, so they
    show what a command has written since. The backbone is loaded by the first step that needs it.

    Args:
        files: paths of the run.
        device: of the backbone: ``auto``, ``cpu``, ``cuda``, ...
        dtype: of the backbone; ``auto`` is float32 on a CPU.
        model: backbone and data set, where they are loaded already.
    """

    def __init__(
        self,
        files: RunFolder,
        device: str = "auto",
        dtype: str = "auto",
        *,
        model: tuple[LoadedBackbone, DataSet] | None = None,
    ) -> None:
        self.files = files
        self._device, self._dtype = device, dtype
        if model is not None:  # loaded already
            self.model = model

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
        from schedule_finder.models.loading import load_backbone, set_threads
        from schedule_finder.samples import open_data

        options = self.options
        how = LoadOptions.of_run(options.get("loading", {}))
        with self.files.opening():
            data = open_data(options["dataset"], seed=options["seed"], **options["columns"])
            set_threads(options["backbone"])
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
        progress: Progress = silent,
    ) -> Schedule:
        """Step 4: a schedule for a budget. It is kept in the run under ``name`` and selected.

        Args:
            budget: fraction of the unpruned cost, above 0 and at most 1.
            kind: unit of the budget: processed, published, flops, kv or latency.
            solver: as ``--solver`` of ``adaptinfer-profile schedule``.
            scorer: as ``--scorer``.
            dropped_tokens: as ``--dropped-tokens``.
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
        max_skipped: float = 0.05,
        batch_size: int = 32,
        progress: Progress = silent,
    ) -> pd.DataFrame:
        """Step 5: schedules and baselines against the full model on held-out samples; returns `evaluation`.

        Args:
            schedules: names of the run's schedules, or files; none: the selected one.
            baselines: names, ``"all"`` or ``"none"``; None: three of them.
            eval_samples: use the first held-out samples only; None: all.
            max_new_tokens: longest answer.
            metric: how answers are judged; None: that of the run or of the data set.
            max_skipped: share of the held-out samples that may be unusable.
            batch_size: samples in a forward pass.
            progress: called with the answers done and all answers.

        Returns:
            One row per method, budget and question type; see `evaluation`.

        Raises:
            InputError: an unknown name, no held-out samples, or too many of them cannot be used.
            ScheduleError: there is no schedule, or it is for another backbone.
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
            max_skipped=max_skipped,
        )
        return self.evaluation

    def figures(
        self, *, style: Literal["screen", "paper"] = "screen", column: float | None = None
    ) -> list[Path]:
        """Step 6: draw the figures that the run has data for, as PDF, PNG and table (CSV); returns the files.

        Args:
            style: ``paper`` has a serif.
            column: width of a column in inches; None: 3.3. Figures of two columns are wider in proportion.

        Raises:
            InputError: a file of the run cannot be used.
        """
        from schedule_finder.figures import make_figures

        with self.files.step("plot"):
            return make_figures(self.files, report=log.warning, style=style, column=column)

    def report(self, path: str | os.PathLike[str] | None = None, *, viewer: bool = True) -> Path:
        """Step 7: write one HTML file about the run and return its path.

        Args:
            path: of the file; None: ``report.html`` in the run's folder.
            viewer: record the viewer's samples with the backbone where that is not done yet.

        Raises:
            InputError: a package of the extra ``report`` is missing, or a file of the run cannot be used.
        """
        from schedule_finder import pipeline
        from schedule_finder.report import check_packages, write_report
        from schedule_finder.report.viewer import current_viewer

        check_packages()
        selected = self.files.schedules.selected()
        known = selected is not None and current_viewer(self.files, selected.digest) is not None
        if viewer and selected is not None and self.files.answers.exists() and not known:
            pipeline.viewer_step(self.files, *self.model, silent)
        return write_report([self.files], self.files.report if path is None else Path(path))

    def push_to_hub(
        self, repo_id: str, *, name: str | None = None, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload the selected schedule with its held-out numbers and the accuracy figure; returns the commit's address.

        See `Schedule.push_to_hub`. Numbers and figure of another schedule are left out.
        """
        from schedule_finder.evidence import HeldOutSummary, digest
        from schedule_finder.run.stale import figure_digest

        schedule = self.schedule
        known = digest(schedule)
        summary = HeldOutSummary.load(self.files.evaluation_summary)
        part = None if summary is None else summary.of(known)
        results = None
        if part is not None:
            results = {key: one.model_dump(exclude_none=True) for key, one in part.methods.items()}
        figure = self.files.figures / "5_accuracy.png"
        return schedule.push_to_hub(
            repo_id,
            name=name,
            results=results,
            figure=figure if figure_digest(figure) == known else None,
            private=private,
            token=token,
        )

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

    def load_samples(self, count: int, use: Literal["calibration", "held_out"] = "held_out") -> list[Sample]:
        """The first ``count`` usable samples with their images."""
        from schedule_finder.samples import BadSample, read_entries

        found: list[Sample] = []
        for entry in read_entries(self.files.samples):
            if entry.use != use or len(found) == count:
                continue
            try:
                found.append(self.model[1].load(entry))
            except BadSample:
                continue
        return found

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
        """Answer KL in nats of single stages, one row per layer, keep ratio and sample.

        Layer -1 is a stage before the decoder. Raises `InputError` where nothing was measured.
        """
        from schedule_finder.measuring.sensitivity_table import SensitivityTable

        return SensitivityTable.load(self.files.sensitivity).to_pandas()

    @property
    def evaluation(self) -> pd.DataFrame:
        """The evaluation, one row per method, budget and question type. Raises `InputError` where there is none.

        Scores and ``processed`` (vision tokens) are shares in [0, 1], ``kl`` is in nats, ``prefill_ms`` in
        milliseconds per sample. ``question_type`` is ``all`` in the rows over all samples.
        """
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


def _check_choice(what: str, given: str, known: Any) -> None:
    if given not in known:
        raise InputError(f"{what} {given!r}: choose {', '.join(known)}")


def _need(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path}: not there; call `evaluate` first")
    return path
