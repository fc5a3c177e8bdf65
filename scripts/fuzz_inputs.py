"""Broken schedules, data files, run folders and options through the real command line, in one process.

Each case takes valid input, breaks it at random (seeded), and calls a command. A case fails where

- an exception leaves the command (a traceback for the user),
- the exit code is not 0 (the damage did no harm) or 2 (bad input, refused in one line): 1 is for failures of a
  command, and no case here gives a reason for one,
- a file is lost: one that the command does not write is changed or removed, or a result is changed by a command
  that was refused,
- it computes longer than `MOST_SECONDS`, or waits longer than `MOST_WAITED`.

A case takes 0.1 s of CPU time on average. The embedded demo backbone is loaded once for all cases; figures are encoded
at a low resolution and with fonts that need no subsetting, as encoding took most of the time of all cases. Run from the
repository root:

    python -m scripts.fuzz_inputs --cases 10000 --seed 0

It prints each failing case with the command to repeat it, a summary by kind of input and exit code, and as the last
line one JSON document. The exit code is 1 if a case failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # before the first import of huggingface_hub: names are not looked up

import numpy as np
from typer.testing import CliRunner

from schedule_finder.cli.commands import app
from schedule_finder.figures.style import STYLE
from schedule_finder.models import loading
from scripts.fuzz_damage import damaged_bytes, damaged_json, damaged_rows
from scripts.fuzz_options import NO_MODEL, broken_options

MOST_SECONDS = 60
"""CPU time of a case: other work on the machine does not count."""
MOST_WAITED = 1800
"""Wall time of a case, far above what a busy machine makes of `MOST_SECONDS`."""
PROGRESS = 500
"""Cases between two lines of progress; after a crash `--first` goes on from the last one."""
ALWAYS_WRITTEN = ("run.json", ".lock")
WRITES = {
    "detect": ("3_",),
    "schedule": ("4_", "6_figures"),
    "evaluate": ("1_samples.jsonl", "4_", "5_"),
    "plot": ("6_figures",),
    "profile": ("1_", "2_"),
    "inspect": (),
    "merge": (),
    "bench": (),
}
"""What each command may write in a run that exists, besides `ALWAYS_WRITTEN`."""
RESULTS = (
    "3_change_points.json",
    "4_schedule.json",
    "5_evaluation.csv",
    "5_evaluation.json",
    "5_answers.parquet",
)
"""Files that a refused command leaves as they are."""


@dataclass(frozen=True)
class Case:
    """A command on broken input; ``folder`` holds everything that it may find."""

    kind: str
    arguments: list[str]
    folder: Path


@dataclass
class Found:
    """What the cases gave: counts by (kind, exit code), and the defects."""

    counts: Counter[tuple[str, int]] = field(default_factory=Counter)
    defects: list[dict[str, Any]] = field(default_factory=list)


class TooLong(BaseException):
    """A case took longer than it may; no handler of a command catches it."""


def main() -> int:
    """Run the cases and print the summary; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of input, with commas between")
    asked = parser.parse_args()
    faulthandler.enable()  # a crash of a library's reader ends this process; its stack says where
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        found = fuzz(
            Path(folder), range(asked.first, asked.first + asked.cases), asked.seed, asked.kinds.split(",")
        )
    codes = sorted({code for _, code in found.counts})
    print(f"\n{'kind':<12}" + "".join(f"{f'code {code}':>10}" for code in codes))
    for kind in sorted({kind for kind, _ in found.counts}):
        print(f"{kind:<12}" + "".join(f"{found.counts[kind, code]:>10}" for code in codes))
    print(f"{sum(found.counts.values())} cases, {len(found.defects)} defects")
    counts = {f"{kind}:{code}": count for (kind, code), count in sorted(found.counts.items())}
    print(json.dumps({"seed": asked.seed, "counts": counts, "defects": len(found.defects)}))
    return int(bool(found.defects))


def fuzz(
    folder: Path, numbers: Sequence[int], seed: int, kinds: Sequence[str] = (), base: Path | None = None
) -> Found:
    """Run the cases ``numbers``; each depends on its number and ``seed`` only.

    Args:
        folder: an empty folder for everything that is written.
        numbers: which cases.
        seed: of all of them.
        kinds: of input, from `KINDS`; empty: all.
        base: a finished run of the demo; made in ``folder`` if not given.
    """
    found = Found()
    with _demo_loaded_once(), _figures_encoded_fast():
        base = base or make_base(folder / "base")
        for number in numbers:
            rng = np.random.default_rng([seed, number])
            kind = str(rng.choice(list(kinds or KINDS)))
            work = folder / "case"
            work.mkdir()
            case = Case(kind, KINDS[kind](rng, base, work), work)
            code, problems = run_case(case)
            found.counts[kind, code] += 1
            for problem in problems:
                found.defects.append({"case": number, "kind": kind, "problem": problem})
                print(
                    f"case {number} ({kind}): {problem}\n  {' '.join(map(repr, case.arguments))}", flush=True
                )
            shutil.rmtree(work)
            if (number + 1) % PROGRESS == 0:
                print(f"case {number} done, {len(found.defects)} defects", flush=True)
    return found


@contextmanager
def _demo_loaded_once() -> Iterator[None]:
    """Let `load_backbone` return the same demo every time: only the speed of the cases depends on it."""
    original = loading.load_backbone
    loaded: dict[str, Any] = {}

    def load(name: str, *more: Any, **options: Any) -> Any:
        if name != "demo":
            return original(name, *more, **options)
        key = repr((more, sorted(options.items())))
        if key not in loaded:
            loaded[key] = original(name, *more, **options)
        return loaded[key]

    loading.load_backbone = load  # type: ignore[assignment]
    # Libraries keep the stream of the first command that they logged in, which is closed in the next one.
    raises, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    finally:
        loading.load_backbone, logging.raiseExceptions = original, raises


@contextmanager
def _figures_encoded_fast() -> Iterator[None]:
    """What is drawn stays the same; the PNG has fewer pixels, and the PDF outlines instead of font programs."""
    original = dict(STYLE)
    STYLE.update({"savefig.dpi": 50, "pdf.fonttype": 3})
    try:
        yield
    finally:
        STYLE.update(original)


def make_base(folder: Path) -> Path:
    """A small finished run of the demo, without figures."""
    steps = [
        ["profile", "demo", "--samples", "8", "--eval-samples", "4", "--out", str(folder)],
        ["detect", str(folder)],
        ["schedule", str(folder), "--budget", "40%"],
        ["evaluate", str(folder), "--baselines", "random", "--max-new-tokens", "2"],
    ]
    for step in steps:
        result = CliRunner().invoke(app, step)
        if result.exit_code:
            raise RuntimeError(f"{' '.join(step)}: {result.output}")
    return folder


def run_case(case: Case) -> tuple[int, list[str]]:
    """The exit code of a case, and what is wrong with its result."""
    before = _checksums(case.folder)
    try:
        with _limited():
            result = CliRunner().invoke(app, case.arguments)
    except TooLong as stopped:
        return -1, [str(stopped)]
    problems = []
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        problems.append(f"traceback: {type(result.exception).__name__}: {result.exception}")
    elif "Traceback" in result.output:
        problems.append(f"traceback in the output: {result.output.strip()[-1500:]}")
    elif result.exit_code not in (0, 2):
        problems.append(f"exit code {result.exit_code}: {result.output.strip()[-300:]}")
    elif result.exit_code == 2 and not _one_line(result.output):
        problems.append(f"no line of error: {result.output.strip()[-300:]}")
    return result.exit_code, problems + list(_lost(case, before, result.exit_code))


def _one_line(output: str) -> bool:
    """Whether the output names the error: one line, or the box of an option that cannot be parsed."""
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    return len(errors) == 1 or "Usage:" in output


def _lost(case: Case, before: dict[str, str], code: int) -> Iterator[str]:
    """Files that the command lost."""
    allowed = (*ALWAYS_WRITTEN, *WRITES.get(case.arguments[0], ("",)))
    after = _checksums(case.folder)
    for name, checksum in before.items():
        inside = name.partition("/")[2] if name.startswith("run/") else ""
        if after.get(name) == checksum:
            continue
        if case.arguments[0] == "profile" and _is_set_aside(name, checksum, after):
            continue
        if not inside or not inside.startswith(allowed):
            yield f"{name} is {'changed' if name in after else 'removed'}"
        elif code and inside in RESULTS:
            yield f"{name} is {'changed' if name in after else 'removed'} by a command that was refused"


def _is_set_aside(name: str, checksum: str, after: dict[str, str]) -> bool:
    """Whether a damaged or foreign shard is kept under another name beside its place."""
    return any(
        after.get(str(Path(name).with_suffix(suffix))) == checksum for suffix in (".corrupt", ".unlisted")
    )


def _checksums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def _limited() -> Iterator[None]:
    """Raise `TooLong` in a body that computes or waits too long."""

    def stop(which: int, _frame: Any) -> None:
        raise TooLong(
            f"computes longer than {MOST_SECONDS} s"
            if which == signal.SIGPROF
            else f"waits longer than {MOST_WAITED} s"
        )

    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, MOST_WAITED)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


# ---- kinds of input


def broken_schedule(rng: np.random.Generator, base: Path, work: Path) -> list[str]:
    """A damaged schedule file, alone or in its run."""
    text = (base / "4_schedule.json").read_bytes()
    whole_run = rng.random() < 0.5
    path = work / "schedule.json"
    if whole_run:
        path = shutil.copytree(base, work / "run") / "4_schedule.json"
    path.write_bytes(_damaged_document(rng, text))
    if not whole_run:
        return ["inspect", str(path)]
    command = str(rng.choice(["inspect", "evaluate"], p=[0.75, 0.25]))
    fast = ["--baselines", "none", "--max-new-tokens", "1"] if command == "evaluate" else []
    return [command, str(work / "run"), *fast]


def _damaged_document(rng: np.random.Generator, text: bytes) -> bytes:
    if rng.random() < 0.3:
        return damaged_bytes(rng, text)
    return json.dumps(damaged_json(rng, json.loads(text)), indent=2).encode()


def broken_data(rng: np.random.Generator, base: Path, work: Path) -> list[str]:
    """A damaged data file under ``profile`` with the demo."""
    suffix = str(rng.choice(["jsonl", "csv", "tsv", "parquet", "json"]))
    path = damaged_rows(rng, work, suffix)
    options = ["--samples", "2", "--eval-samples", str(rng.choice([0, 1])), "--max-skipped", "100%"]
    return ["profile", "demo", "--dataset", str(path), "--out", str(work / "new"), *options]


def broken_run(rng: np.random.Generator, base: Path, work: Path) -> list[str]:
    """A run folder with one damaged, missing or exchanged file."""
    run = shutil.copytree(base, work / "run")
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    path = files[rng.integers(len(files))]
    how = rng.random()
    if how < 0.1:
        path.unlink()
    elif how < 0.2:
        path.write_bytes(files[rng.integers(len(files))].read_bytes())
    elif how < 0.25:
        path.unlink()
        path.mkdir()
    elif path.suffix == ".json" and how < 0.75:
        path.write_text(json.dumps(damaged_json(rng, json.loads(path.read_bytes()))))
    else:
        path.write_bytes(damaged_bytes(rng, path.read_bytes()))
    command = str(rng.choice(["inspect", "detect", "schedule", "merge", "evaluate", "profile", "plot"],
                             p=[0.3, 0.25, 0.25, 0.05, 0.05, 0.05, 0.05]))  # fmt: skip
    more = {
        "schedule": NO_MODEL if rng.random() < 0.7 else ("--no-model",),
        "merge": (str(base), "--out", str(work / "joined")),
        "evaluate": ("--baselines", "none", "--max-new-tokens", "1"),
        "profile": ("--samples", "8", "--eval-samples", "4", "--out", str(run)),
    }
    target = "demo" if command == "profile" else str(run)
    return [command, target, *more.get(command, ())]


KINDS: dict[str, Callable[[np.random.Generator, Path, Path], list[str]]] = {
    "schedule": broken_schedule,
    "data": broken_data,
    "run": broken_run,
    "options": broken_options,
}

if __name__ == "__main__":
    sys.exit(main())
