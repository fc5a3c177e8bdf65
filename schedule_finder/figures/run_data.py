"""What a run folder holds for figures, read once and checked."""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from pruning_runtime.schedule import Schedule, Stage
from schedule_finder.errors import InputError
from schedule_finder.evidence import Evidence
from schedule_finder.measuring.sensitivity_table import SensitivityTable
from schedule_finder.run.reader import read_change_points

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from schedule_finder.profiling.store import Profile
    from schedule_finder.run.folder import Run


class RunData:
    """What a run folder holds; None for what is not there (yet)."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @cached_property
    def profile(self) -> Profile | None:
        """The profile, where a part of it is written."""
        begun = any(self.run.profile.folder.glob("part-*.parquet"))
        return self.run.profile.read() if begun else None

    @cached_property
    def schedule(self) -> Schedule | None:
        """The schedule."""
        return Schedule.load(self.run.schedule) if self.run.schedule.exists() else None

    @cached_property
    def evidence(self) -> Evidence:
        """The schedule's evidence; empty where there is no schedule."""
        return Evidence() if self.schedule is None else Evidence.of(self.schedule, self.run.schedule)

    @cached_property
    def detections(self) -> dict[str, Any] | None:
        """What the detectors found."""
        path = self.run.change_points
        return read_change_points(path).model_dump() if path.exists() else None

    @cached_property
    def convergence(self) -> pd.DataFrame | None:
        """The checks of a growing profile, where the number of samples was to be found out."""
        path = self.run.convergence
        if not path.exists():
            return None
        table = _read_table(path, ("change_points", "stages"), ("samples", "ratio_error"), "profile again")
        return table.fillna({"change_points": "", "stages": ""})

    @cached_property
    def sensitivity(self) -> SensitivityTable | None:
        """What single stages do to the answer."""
        return SensitivityTable.load(self.run.sensitivity) if self.run.sensitivity.exists() else None

    @cached_property
    def pareto(self) -> pd.DataFrame | None:
        """The front over budgets, with ``num_stages``."""
        return _read_pareto(self.run.pareto) if self.run.pareto.exists() else None

    @cached_property
    def evaluation(self) -> pd.DataFrame | None:
        """The evaluation over all question types."""
        return read_evaluation(self.run.evaluation) if self.run.evaluation.exists() else None

    @cached_property
    def example(self) -> tuple[dict[str, Any], Image.Image] | None:
        """One sample with what every stage left of it, and its image."""
        described, pictured = self.run.folder / "5_example.json", self.run.folder / "5_example.png"
        if not (described.exists() and pictured.exists()):
            return None
        try:
            with Image.open(pictured) as image:
                return _read_example(described), image.convert("RGB")
        except OSError as error:
            raise InputError(f"{pictured}: not a readable image ({error}); evaluate again") from error

    @property
    def change_points(self) -> list[int]:
        """The default detector's, none where none was run."""
        if self.detections is None:
            return []
        return list(self.detections["detectors"][self.detections["default"]]["change_points"])

    @property
    def num_layers(self) -> int | None:
        """Of the backbone; None where neither profile nor schedule tells."""
        if self.profile is not None:
            return self.profile.num_layers
        return self.schedule.backbone.num_layers if self.schedule else None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The schedule's; none where there is no schedule."""
        return self.schedule.stages if self.schedule else ()


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
        raise InputError(f"{path}: n, agreement and processed must be there in every row; {again}")
    return table


def _read_pareto(path: Path) -> pd.DataFrame:
    """The front, checked. Raises `InputError`."""
    numbers = ("budget", "processed", "predicted_kl", "measured_kl")
    table = _read_table(path, ("stages",), numbers, "run `schedule --pareto` again")
    return table.assign(num_stages=[len(stages.split()) for stages in table.stages.fillna("")])


def _read_table(path: Path, texts: Sequence[str], numbers: Sequence[str], remedy: str) -> pd.DataFrame:
    """A table with at least these columns. Raises `InputError`, whose message ends in ``remedy``."""
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


def _read_example(path: Path) -> dict[str, Any]:
    """``5_example.json``, checked. Raises `InputError`."""
    example = read_json(path, "evaluate again")
    fields = ("question", "answer", "full_answer", "pruned_answer", "grid", "stages", "regions")
    need(example, fields, path, "evaluate again")
    rows, columns = example["grid"]
    for tokens in (example["regions"], *(stage["kept"] for stage in example["stages"])):
        if tokens and not 0 <= min(tokens) <= max(tokens) < rows * columns:
            raise InputError(
                f"{path}: token {min(tokens) if min(tokens) < 0 else max(tokens)} is outside the grid of "
                f"{rows} x {columns}; evaluate again"
            )
    return example


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a file. Raises `InputError`, whose message ends in ``remedy``."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not readable ({error}); {remedy}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: holds no JSON object; {remedy}")
    return document


def need(there: Any, names: Sequence[str], path: Path, remedy: str) -> None:
    """Refuse a document or table that lacks one of ``names``. Raises `InputError`."""
    missing = [name for name in names if name not in there]
    if missing:
        raise InputError(f"{path}: no {', '.join(missing)} in it; {remedy}")
