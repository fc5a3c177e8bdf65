"""The data of a run that figures are drawn from, read once and checked."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image
from pydantic import BaseModel, ValidationError, model_validator

from pruning_runtime.schedule import Schedule, Stage
from schedule_finder.errors import InputError
from schedule_finder.evaluation.allocation_table import read_allocation
from schedule_finder.evidence import Evidence, digest
from schedule_finder.files import parse_json
from schedule_finder.measuring.sensitivity_table import SensitivityTable
from schedule_finder.report.viewer import Viewer, current_viewer
from schedule_finder.run.reader import ChangePoints, read_change_points
from schedule_finder.run.stale import example_digest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from schedule_finder.profiling.store import Profile
    from schedule_finder.run.folder import Run


class KeptTokens(BaseModel):
    """Indices of the tokens that are left after the stage at ``layer``."""

    layer: int
    kept: list[int]


class Example(BaseModel):
    """One sample with the tokens that each stage keeps: ``5_example.json``.

    ``grid`` is (rows, columns); ``regions`` are the tokens that the answer depends on, if the data set states them.
    """

    question: str
    answer: str | None
    full_answer: str
    pruned_answer: str
    grid: tuple[int, int]
    stages: list[KeptTokens]
    regions: list[int]

    @model_validator(mode="after")
    def _tokens_in_the_grid(self) -> Example:
        rows, columns = self.grid
        for tokens in (self.regions, *(stage.kept for stage in self.stages)):
            wrong = [token for token in tokens if not 0 <= token < rows * columns]
            if wrong:
                raise ValueError(f"token {wrong[0]} is outside the grid of {rows} x {columns}")
        return self


class RunData:
    """The files of a run; None for a file that does not exist (yet)."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.uses_schedule = False
        """Whether a figure has read the schedule; set to False before each."""
        self.left_out: list[str] = []
        """Results that belong to another schedule and are not drawn."""

    @cached_property
    def profile(self) -> Profile | None:
        """The profile, if a part of it is written."""
        begun = any(self.run.profile.folder.glob("part-*.parquet"))
        return self.run.profile.read() if begun else None

    @property
    def schedule(self) -> Schedule | None:
        """The selected schedule."""
        self.uses_schedule = True
        return self._schedule

    @cached_property
    def _schedule(self) -> Schedule | None:
        return Schedule.load(self.run.schedule) if self.run.schedule.exists() else None

    @cached_property
    def digest(self) -> str | None:
        """Identity of the selected schedule; None if there is none."""
        return None if self._schedule is None else digest(self._schedule)

    @cached_property
    def evidence(self) -> Evidence:
        """The schedule's evidence; empty if there is no schedule."""
        return Evidence() if self.schedule is None else Evidence.of(self.schedule, self.run.schedule)

    @cached_property
    def detections(self) -> ChangePoints | None:
        """The detectors' results."""
        path = self.run.change_points
        return read_change_points(path) if path.exists() else None

    @cached_property
    def convergence(self) -> pd.DataFrame | None:
        """The checks of a growing profile, for ``--samples auto``."""
        path = self.run.convergence
        if not path.exists():
            return None
        table = _read_table(path, ("change_points", "stages"), ("samples", "ratio_error"), "profile again")
        return table.fillna({"change_points": "", "stages": ""})

    @cached_property
    def sensitivity(self) -> SensitivityTable | None:
        """The sensitivity table."""
        return SensitivityTable.load(self.run.sensitivity) if self.run.sensitivity.exists() else None

    @cached_property
    def pareto(self) -> pd.DataFrame | None:
        """The front over budgets, with ``num_stages``."""
        return _read_pareto(self.run.pareto) if self.run.pareto.exists() else None

    @property
    def evaluation(self) -> pd.DataFrame | None:
        """The selected schedule's evaluation over all question types; None if it was not evaluated."""
        self.uses_schedule = True
        return self._evaluation

    @cached_property
    def _evaluation(self) -> pd.DataFrame | None:
        path = self.run.evaluation
        if not path.exists():
            return None
        table = read_evaluation(path)
        if "digest" not in table or table.digest.isna().all() or self.digest is None:  # an older run
            return table
        ours = table[table.digest == self.digest]
        if ours.empty:
            self.left_out.append(f"{path.name} is of {_names(table)}, not of the selected schedule")
            return None
        # Evaluated under two names, it has the same rows twice.
        own = ours.schedule.iloc[0]
        ours = ours[ours.schedule == own].replace({"method": {own: "schedule"}})
        return pd.concat([table[table.method == "full"], ours])

    @property
    def evaluation_by_type(self) -> pd.DataFrame | None:
        """Rows of the full model and of the selected schedule at its budget by question type; None without scores."""
        overall = self.evaluation
        own = overall[overall.method == "schedule"] if overall is not None else None
        if own is None or own.empty:
            return None
        table = pd.read_csv(self.run.evaluation)
        if not {"score", "score_low", "score_high", "schedule"} <= set(table):
            return None
        name, budget = own.schedule.iloc[0], own.budget.iloc[0]
        ours = table[table.method.isin(["schedule", name]) & ((table.budget - budget).abs() < 1e-9)]
        if isinstance(name, str):
            ours = ours[ours.schedule == name]
        both = pd.concat([table[table.method == "full"], ours.assign(method="schedule")])
        return both[both.question_type != "all"]

    @cached_property
    def allocation(self) -> pd.DataFrame | None:
        """Attention of the full model on text, vision tokens and answer, by sample and layer."""
        return read_allocation(self.run.allocation) if self.run.allocation.exists() else None

    @property
    def example(self) -> tuple[Example, Image.Image] | None:
        """One sample with the tokens that each stage of the selected schedule keeps, and its image."""
        self.uses_schedule = True
        return self._example

    @cached_property
    def _example(self) -> tuple[Example, Image.Image] | None:
        described, pictured = self.run.folder / "5_example.json", self.run.folder / "5_example.png"
        if not (described.exists() and pictured.exists()):
            return None
        if self.digest is not None and example_digest(described) not in (None, self.digest):
            self.left_out.append(f"{described.name} is of another schedule")
            return None
        try:
            with Image.open(pictured) as image:
                return _read_example(described), image.convert("RGB")
        except OSError as error:
            raise InputError(f"{pictured}: not a readable image ({error}); evaluate again") from error

    @property
    def viewer(self) -> Viewer | None:
        """The samples of the report's viewer, if they are of the selected schedule and of the last evaluation."""
        self.uses_schedule = True
        return None if self.digest is None else current_viewer(self.run, self.digest)

    @property
    def change_points(self) -> list[int]:
        """Those of the default detector; empty if no detector was run."""
        return [] if self.detections is None else self.detections.of()

    @property
    def num_layers(self) -> int | None:
        """Of the backbone; None if there is neither a profile nor a schedule."""
        if self.profile is not None:
            return self.profile.num_layers
        return self.schedule.backbone.num_layers if self.schedule else None

    @property
    def layers_without_profile(self) -> list[int]:
        """Layers that have no attention to record, as in hybrid decoders."""
        if self.profile is None:
            return []
        return sorted(set(range(self.profile.num_layers)) - set(self.profile.meta["layers"]))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those of the schedule; empty if there is no schedule."""
        return self.schedule.stages if self.schedule else ()

    @property
    def mean_vision(self) -> float | None:
        """Vision tokens of a typical sample; None if neither profile nor schedule states them."""
        if self.profile is not None:
            return self.profile.mean_vision
        prompt = self.evidence.typical_prompt
        return None if prompt is None else prompt.vision_tokens


def _names(table: pd.DataFrame) -> str:
    """The schedules of an evaluation, in words."""
    return ", ".join(str(name) for name in table.schedule.dropna().unique() if name) or "another schedule"


def read_evaluation(path: Path) -> pd.DataFrame:
    """The rows over all question types, checked. Raises `InputError`."""
    again = "evaluate again"
    shares = ("exact_match", "ci_low", "ci_high", "agreement", "processed")
    table = _read_table(path, ("method", "question_type"), ("budget", "n", *shares), again)
    for column in shares:
        wrong = table[(table[column] < 0) | (table[column] > 1)]
        if len(wrong):
            row = wrong.iloc[0]
            raise InputError(
                f"{path}: {column} of {row.method!r} is {row[column]:g}, need a share from 0 to 1; {again}"
            )
    table = table[table.question_type == "all"]
    if not (table.method == "full").any():
        raise InputError(f"{path}: no row with method 'full' and question_type 'all'; {again}")
    if table[["n", "agreement", "processed"]].isna().any(axis=None):
        raise InputError(f"{path}: n, agreement and processed must be given in every row; {again}")
    return table


def _read_pareto(path: Path) -> pd.DataFrame:
    """The front, checked. Raises `InputError`."""
    numbers = ("budget", "processed", "predicted_change", "measured_change")
    table = _read_table(path, ("stages",), numbers, "run `schedule --pareto` again")
    return table.assign(num_stages=[len(stages.split()) for stages in table.stages.fillna("")])


def _read_table(path: Path, texts: Sequence[str], numbers: Sequence[str], remedy: str) -> pd.DataFrame:
    """A table with at least these columns. Raises `InputError`; its message ends with ``remedy``."""
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(texts, "str"))
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable table ({error}); {remedy}") from error
    need(table, (*texts, *numbers), path, remedy)
    for column in numbers:
        try:
            table[column] = pd.to_numeric(table[column])
        except ValueError as error:
            raise InputError(f"{path}: column {column!r} must hold numbers ({error}); {remedy}") from error
    return table


def _read_example(path: Path) -> Example:
    """``5_example.json``. Raises `InputError`."""
    try:
        return Example.model_validate(read_json(path, "evaluate again"))
    except ValidationError as error:
        first = error.errors()[0]
        field = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        raise InputError(f"{path}: {field}{first['msg']}; evaluate again") from error


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file. Raises `InputError`; its message ends with ``remedy``."""
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not readable ({error}); {remedy}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: holds no JSON object; {remedy}")
    return document


def need(there: Any, names: Sequence[str], path: Path, remedy: str) -> None:
    """Check that a document or table has all ``names``. Raises `InputError`."""
    missing = [name for name in names if name not in there]
    if missing:
        raise InputError(f"{path}: no {', '.join(missing)} in it; {remedy}")
