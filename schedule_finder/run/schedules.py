"""The schedules of a run: every result of step 4 under its name, and which one is selected.

``4_schedules/NAME.json`` is never overwritten by another result. ``4_schedule.json`` is a copy of the selected one;
its ``provenance.name`` says which.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pruning_runtime.errors import ScheduleError
from pruning_runtime.schedule import Schedule
from schedule_finder.errors import InputError
from schedule_finder.evidence import Evidence, digest
from schedule_finder.files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from schedule_finder.run.folder import Run

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class NamedSchedule:
    """A schedule and the name under which it is shown and evaluated."""

    name: str
    schedule: Schedule

    @property
    def digest(self) -> str:
        """Identity of what the schedule does."""
        return digest(self.schedule)


def check_name(name: str) -> str:
    """``name`` if it can be a file name on every system. Raises `InputError`."""
    if not _SAFE.fullmatch(name):
        raise InputError(
            f"--name {name!r}: must begin with a letter or digit and hold only letters, digits, '.', '_' and '-', "
            "at most 100 characters"
        )
    return name


def default_name(schedule: Schedule) -> str:
    """A name from budget, kind and solver, and from the scorer and dropped-token setting that were asked for.

    For example ``25pct-processed-sensitivity``, ``40pct-kv-paper-last_token`` or ``25pct-processed-for-vllm``.
    """
    evidence, budget = Evidence.of(schedule), schedule.budget
    solver = evidence.solver.solver if evidence.solver else None
    asked = evidence.asked
    parts = [
        f"{100 * budget.target:.4g}pct-{budget.kind}" if budget else "schedule",
        f"for-{evidence.serving.engine}"
        if evidence.serving
        else (asked.solver if asked else solver) or "unknown",
    ]
    parts += [value for value in (asked.scorer, asked.dropped_tokens) if value != "auto"] if asked else []
    return re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(parts))


class Schedules:
    """The folder ``4_schedules`` and the selected schedule of a run."""

    def __init__(self, run: Run) -> None:
        self.folder = run.folder / "4_schedules"
        self._selected = run.schedule

    def names(self) -> list[str]:
        """Names of all kept schedules, in alphabetical order."""
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def path(self, name: str) -> Path:
        """The file of a kept schedule."""
        return self.folder / f"{name}.json"

    def selected(self) -> NamedSchedule | None:
        """The schedule in ``4_schedule.json``; None where there is none. Raises `ScheduleError`."""
        if not self._selected.exists():
            return None
        return self._named(self._selected)

    def find(self, given: str) -> NamedSchedule:
        """The kept schedule of that name, or the one in that file. Raises `InputError` or `ScheduleError`."""
        if given in self.names():
            return NamedSchedule(given, Schedule.load(self.path(given)))
        if Path(given).is_file():
            return NamedSchedule(Path(given).stem, Schedule.load(given))
        there = ", ".join(self.names()) or "none yet"
        raise InputError(f"--schedule {given!r}: neither a file nor a schedule of this run (there: {there})")

    def several(self, given: Sequence[str], reserved: Sequence[str] = ()) -> list[NamedSchedule]:
        """`find` for each, with different names: one that is taken or in ``reserved`` gets a number."""
        found: list[NamedSchedule] = []
        for one in map(self.find, given):
            taken = {*reserved, *(other.name for other in found)}
            found.append(NamedSchedule(_numbered(one.name, taken.__contains__), one.schedule))
        return found

    def keep(self, schedule: Schedule, name: str | None = None) -> NamedSchedule:
        """Keep ``schedule`` under ``name`` and select it.

        Args:
            schedule: a result of the search.
            name: None: `default_name`. Where the name holds another result, the new one gets a number (``NAME-2``);
                where it holds the same result, nothing is written there.
        """
        self._keep_selected()
        kept = self._keep(schedule, name or default_name(schedule))
        self._write_selected(kept)
        return kept

    def select(self, name: str) -> NamedSchedule:
        """Make a kept schedule the selected one. Raises `InputError` where there is none of that name."""
        if name not in self.names():
            there = ", ".join(self.names()) or "none yet"
            raise InputError(f"--select {name!r}: no schedule of that name in {self.folder} (there: {there})")
        chosen = Schedule.load(self.path(name))
        self._keep_selected()
        selected = NamedSchedule(name, _with_name(chosen, name))
        self._write_selected(selected)
        return selected

    def _keep(self, schedule: Schedule, name: str) -> NamedSchedule:
        def another(candidate: str) -> bool:
            return self.path(candidate).exists() and not self._holds(candidate, schedule)

        free = _numbered(name, another)
        kept = NamedSchedule(free, _with_name(schedule, free))
        if not self.path(free).exists():
            write_text(self.path(free), kept.schedule.to_json())
        return kept

    def _holds(self, name: str, schedule: Schedule) -> bool:
        try:
            return _result(Schedule.load(self.path(name))) == _result(schedule)
        except ScheduleError:
            return False  # damaged, or of a later release: stays as it is

    def _keep_selected(self) -> None:
        """Keep what ``4_schedule.json`` holds where no kept schedule is equal to it: an older run, or an edited file."""
        if not self._selected.exists():
            return
        try:
            there = self._named(self._selected)
        except (ScheduleError, InputError):
            aside = _numbered("4_schedule.damaged", lambda stem: self._selected.with_name(stem).exists())
            self._selected.rename(self._selected.with_name(aside))
            return
        if not any(self._holds(name, there.schedule) for name in self.names()):
            self._keep(there.schedule, there.name)

    def _write_selected(self, kept: NamedSchedule) -> None:
        write_text(self._selected, kept.schedule.to_json())

    @staticmethod
    def _named(path: Path) -> NamedSchedule:
        schedule = Schedule.load(path)
        name = schedule.provenance.get("name")
        return NamedSchedule(
            name if isinstance(name, str) and _SAFE.fullmatch(name) else default_name(schedule), schedule
        )


def _with_name(schedule: Schedule, name: str) -> Schedule:
    return schedule.model_copy(update={"provenance": {**schedule.provenance, "name": name}})


def _result(schedule: Schedule) -> str:
    """Everything but when and where it was found."""
    return schedule.model_copy(update={"provenance": {}}).to_json()


def _numbered(name: str, taken: Callable[[str], bool]) -> str:
    """``name``, or the first of ``name-2``, ``name-3``, ... that is not taken."""
    candidates = itertools.chain((name,), (f"{name}-{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if not taken(candidate))
