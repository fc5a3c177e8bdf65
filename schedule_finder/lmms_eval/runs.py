"""Run lmms-eval in a process of its own, once per method; finished methods are not run again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from schedule_finder.errors import InputError
from schedule_finder.files import write_json
from schedule_finder.lmms_eval import MODEL_NAME
from schedule_finder.lmms_eval.arguments import FULL

RECORD, DONE, LOG = "record.json", "done.json", "lmms_eval.log"


@dataclass(frozen=True)
class BenchmarkMethod:
    """One model on all tasks: its name, and the plug-in's arguments ``schedule`` and ``baseline``."""

    name: str
    arguments: Mapping[str, str]


@dataclass(frozen=True)
class Benchmark:
    """What is run.

    Attributes:
        out: folder with one folder per method.
        model_args: for every method, ``base`` and ``pretrained`` among them.
        tasks: names, as lmms-eval knows them.
        options: further options of lmms-eval's command line.
        python: of an environment with lmms-eval and this package.
    """

    out: Path
    model_args: Mapping[str, str]
    tasks: Sequence[str]
    options: Sequence[str] = ()
    python: str = "python"
    after_method: Callable[[int], None] = field(default=lambda _done: None, compare=False)

    def run(self, methods: Sequence[BenchmarkMethod]) -> list[Path]:
        """The folder of each method, the unpruned model's first. Raises `InputError` where one gives no results."""
        self._check_python()
        folders = []
        for done, method in enumerate([BenchmarkMethod(FULL, {"baseline": FULL}), *methods], start=1):
            folders.append(self._run_method(method))
            self.after_method(done)
        return folders

    def _check_python(self) -> None:
        """Raise `InputError` before anything is written where lmms-eval is not installed."""
        find = "import sys, importlib.util; sys.exit(importlib.util.find_spec('lmms_eval') is None)"
        try:
            found = subprocess.run([self.python, "-c", find], check=False, capture_output=True).returncode
        except OSError as error:
            raise InputError(f"--python {self.python}: cannot be run ({error.strerror})") from error
        if found:
            raise InputError(
                f"{self.python} has no lmms-eval; install it there with pip install 'adaptinfer[lmms-eval]', or give an "
                "environment that has it with --python"
            )

    def _run_method(self, method: BenchmarkMethod) -> Path:
        folder = (self.out / method.name).resolve()
        command = self._command(method, folder)
        done = folder / DONE
        if done.exists() and json.loads(done.read_text(encoding="utf-8")) == command:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with (folder / LOG).open("w", encoding="utf-8") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False, env=os.environ)
        # lmms-eval ends with 0 after most errors, so that its files decide.
        if not (folder / RECORD).exists() or not any(folder.rglob("*_results.json")):
            raise InputError(
                f"{folder / LOG}: lmms-eval wrote no results for {method.name!r}; {_last_error(folder / LOG)}"
            )
        write_json(done, command)
        return folder

    def _command(self, method: BenchmarkMethod, folder: Path) -> list[str]:
        arguments = {**self.model_args, **method.arguments, "record": str(folder / RECORD)}
        if method.name != FULL:
            arguments["full"] = str((self.out / FULL).resolve() / RECORD)
        return [
            self.python, "-m", "lmms_eval", "--model", MODEL_NAME,
            "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
            "--tasks", ",".join(self.tasks), "--output_path", str(folder), "--log_samples", *self.options,
        ]  # fmt: skip


def _last_error(log: Path) -> str:
    """The last line of a log that names an error."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    named = [line for line in lines if "Error" in line or "error" in line or "No module" in line]
    return f"it said: {named[-1]}" if named else "its output is in this file"
