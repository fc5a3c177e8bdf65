"""A run on disk: numbered files, and the state of each step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from schedule_finder.errors import InputError
from schedule_finder.files import parse_json, write_json
from schedule_finder.provenance import provenance
from schedule_finder.run.schema import problem_of_run

if TYPE_CHECKING:
    from schedule_finder.profiling.store import ProfileStore
    from schedule_finder.run.schedules import Schedules

FORMAT, VERSION = "adaptinfer-run", 1


class Run:
    """The folder of one run. ``run.json`` holds the options and the state of every step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def path(self) -> Path:
        """``run.json``."""
        return self.folder / "run.json"

    @property
    def samples(self) -> Path:
        """Step 1's file."""
        return self.folder / "1_samples.jsonl"

    @property
    def profile(self) -> ProfileStore:
        """Step 2's folder."""
        from schedule_finder.profiling.store import ProfileStore  # imports torch

        return ProfileStore(self.folder / "2_profile")

    @property
    def convergence(self) -> Path:
        """Checks of the growing profile, for ``--samples auto``."""
        return self.folder / "2_convergence.csv"

    @property
    def change_points(self) -> Path:
        """Step 3's file."""
        return self.folder / "3_change_points.json"

    @property
    def sensitivity(self) -> Path:
        """The sensitivity table, measured for step 4; it serves every budget."""
        return self.folder / "4_sensitivity.parquet"

    @property
    def rules(self) -> Path:
        """Scorers compared before the sensitivity table is measured."""
        return self.folder / "4_rules.json"

    @property
    def latency(self) -> Path:
        """The latency model of the decoder on one device, measured for step 4 where a budget needs it."""
        return self.folder / "4_latency.json"

    @property
    def measurements(self) -> Path:
        """Every measurement on the model for step 4, so that an interrupted step continues."""
        return self.folder / "4_measurements"

    @property
    def schedule(self) -> Path:
        """The selected schedule, a copy of one of `schedules`."""
        return self.folder / "4_schedule.json"

    @property
    def schedules(self) -> Schedules:
        """Every result of step 4 by name."""
        from schedule_finder.run.schedules import Schedules  # imports pydantic

        return Schedules(self)

    @property
    def pareto(self) -> Path:
        """The Pareto front over budgets, for ``schedule --pareto``."""
        return self.folder / "4_pareto.csv"

    @property
    def first_answers(self) -> Path:
        """A few answers of the full model, asked for before the profile of `run`."""
        return self.folder / "1_first_answers.json"

    @property
    def answers(self) -> Path:
        """Every answer of step 5."""
        return self.folder / "5_answers.parquet"

    @property
    def evaluation(self) -> Path:
        """Step 5's table."""
        return self.folder / "5_evaluation.csv"

    @property
    def evaluation_summary(self) -> Path:
        """Step 5's result in short, and which schedule it is of."""
        return self.folder / "5_evaluation.json"

    @property
    def allocation(self) -> Path:
        """Attention of the full model by layer, on the first held-out samples and their answers."""
        return self.folder / "5_allocation.csv"

    @property
    def evaluation_parts(self) -> Path:
        """Finished batches of an interrupted step 5; removed when it is done."""
        return self.folder / "5_evaluation.parts"

    @property
    def figures(self) -> Path:
        """Step 6's folder."""
        return self.folder / "6_figures"

    def forget_figures(self, names: Sequence[str]) -> int:
        """Remove the figures of these names, which may hold ``*``, with their tables; returns the number of files."""
        paths = [path for name in names for path in self.figures.glob(f"{name}.*")]
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)

    @property
    def viewer(self) -> Path:
        """The samples of the report's viewer."""
        return self.folder / "7_viewer.json"

    @property
    def report(self) -> Path:
        """The report: one HTML file."""
        return self.folder / "report.html"

    @classmethod
    def begin(cls, folder: Path, command: str, options: dict[str, Any]) -> Run:
        """Make the run, or continue one with the same options. Raises `InputError` where the options differ.

        A run without a single stored sample, as a failed attempt leaves it, is begun anew with any options.
        """
        run = cls(folder)
        if run.path.exists() and not run._is_empty():
            known = run.document()["options"]
            different = [
                f"{name} {known.get(name)!r}"
                for name in {**options, **known}
                if known.get(name) != options.get(name)
            ]
            if different:
                raise InputError(
                    f"{folder} holds a run with another {', '.join(different)}; choose another --out, or the same options"
                )
            return run
        if run.path.exists():
            run.document()  # refuses what is no run
            with run._locked():
                run._forget_samples()
        run._write(
            {
                "format": FORMAT,
                "version": VERSION,
                "command": command,
                "options": options,
                "directory": str(Path.cwd()),
                "provenance": provenance(),
                "steps": {},
            }
        )
        return run

    def document(self) -> dict[str, Any]:
        """The content of ``run.json``. Raises `InputError` where there is no run."""
        try:
            document = parse_json(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"{self.folder}: no run here (no run.json); begin one with `adaptinfer-profile run`"
            ) from None
        except ValueError as error:
            raise InputError(f"{self.path}: not readable ({error}); restore it or begin a new run") from error
        if not isinstance(document, dict):
            raise InputError(f"{self.path}: holds no JSON object; restore it or begin a new run")
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            raise InputError(f"{self.path}: not a run of version {VERSION}")
        if (problem := problem_of_run(document)) is not None:
            raise InputError(f"{self.path}: {problem}; restore it or begin a new run")
        return document

    @property
    def options(self) -> dict[str, Any]:
        """Options of the run."""
        return self.document()["options"]

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Around opening what the options name: an `InputError` also says where relative paths begin."""
        try:
            yield
        except InputError as error:
            begun = self.document().get("directory")
            if begun is None or begun == str(Path.cwd()):
                raise
            raise InputError(
                f"{error} (the run was begun in {begun}; run this command there if paths are relative)"
            ) from error

    @contextmanager
    def step(self, name: str, **options: Any) -> Iterator[dict[str, Any]]:
        """Record a step: its state, its options, its time; the body may add facts to the yielded dictionary.

        Raises `InputError` where another process works on the run. The lock ends with the process that holds it.
        """
        with self._locked():
            yield from self._recorded(name, options)

    def _is_empty(self) -> bool:
        """Whether no sample is stored and no later step has written anything."""
        stored = any((self.folder / "2_profile").glob("part-*.parquet"))
        return not stored and not self.change_points.exists() and not self.schedule.exists()

    def _forget_samples(self) -> None:
        """Remove the list of samples and the description of the profile that none of them reached."""
        for path in (self.samples, self.samples.with_name(f"{self.samples.name}.updates"), self.convergence):
            path.unlink(missing_ok=True)
        for name in ("meta.json", "manifest.json"):
            (self.folder / "2_profile" / name).unlink(missing_ok=True)

    def _locked(self) -> AbstractContextManager[Any]:
        """The lock of the run. Raises `InputError` where another process holds it."""
        try:
            return FileLock(self.folder / ".lock").acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"{self.folder}: another process is working on this run; wait for it, or choose another --out"
            ) from None
        except NotImplementedError:  # a file system without locks
            return nullcontext()
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror or error})") from error

    def _recorded(self, name: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        entry: dict[str, Any] = {"state": "running", **options}
        self._update(name, entry)
        begun = time.perf_counter()
        try:
            yield entry
        except BaseException:
            entry["state"] = "failed"
            with suppress(InputError):  # a full disk is what failed, perhaps
                self._update(name, entry)
            raise
        entry |= {"state": "done", "seconds": round(time.perf_counter() - begun, 2)}
        self._update(name, entry)

    def _update(self, name: str, entry: dict[str, Any]) -> None:
        document = self.document()
        document["steps"][name] = entry
        self._write(document)

    def _write(self, document: dict[str, Any]) -> None:
        write_json(self.path, document)
