"""Time of a search over the time of profiling 1000 samples, by part, and what sharing layers saves.

    python -m scripts.bench_search outputs/photo_backbone --dataset photo

Profiles samples into a temporary folder, detects change points and searches for one budget, with `SharedStates` and
without. Processor time of one thread. Schedules must be equal.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import schedule_finder
from pruning_runtime import Schedule
from schedule_finder.measuring.answer_kl import AnswerKL
from schedule_finder.measuring.shared_states import SharedStates
from schedule_finder.models.loading import LoadedBackbone, load_backbone
from schedule_finder.run.folder import Run
from schedule_finder.samples import DataSet, Sample, open_data
from schedule_finder.search import CHOICE_SAMPLES, TABLE_SAMPLES, Search

PROFILED = 1000
"""Samples of the profile that a search is compared with."""


class TimedSearch(Search):
    """A search that adds up the processor time of its parts.

    Args:
        run: with a profile and change points.
        model: backbone and data set.
        sharing: whether schedules share layers.
    """

    def __init__(self, run: Run, model: tuple[LoadedBackbone, DataSet], *, sharing: bool) -> None:
        super().__init__(run, model)
        self._sharing = sharing
        self.seconds: dict[str, float] = {}
        self.measured: list[AnswerKL] = []

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begun, inner = time.process_time(), sum(self.seconds.values())
        yield
        own = time.process_time() - begun - (sum(self.seconds.values()) - inner)
        self.seconds[part] = self.seconds.get(part, 0.0) + own

    def solve(self, *args: Any, **options: Any) -> Schedule:
        """As `Search.solve`."""
        with self._timed("choice among schedules"):
            return super().solve(*args, **options)

    def sensitivity_table(self, *args: Any, **options: Any) -> Any:
        """As `Search.sensitivity_table`."""
        with self._timed("table"):
            return super().sensitivity_table(*args, **options)

    def _best_rules(self, *args: Any, **options: Any) -> Any:
        with self._timed("rules"):
            return super()._best_rules(*args, **options)

    def _measure_on(self, samples: list[Sample], most: int) -> AnswerKL:
        with self._timed("answers of the unpruned model"):
            found = super()._measure_on(samples, most)
        if not self._sharing:
            found._states = SharedStates(found._backbone, most_bytes=0)
        self.measured.append(found)
        return found


def main() -> None:
    """Profile, search twice, print a table and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbone")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--samples", type=int, default=TABLE_SAMPLES + CHOICE_SAMPLES)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--shared-only", action="store_true", help="leave out the search without sharing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        profile, parts, schedules = _measure(asked, Path(folder))
    stages = [schedule.stages for schedule in schedules.values()]
    assert stages[0] == stages[-1], "sharing layers changed the schedule"
    print(f"profile of {PROFILED} samples: {profile:.0f} s")
    print(f"{'':32}" + "".join(f"{name:>20}" for name in parts))
    for part in parts["shared"]:
        cells = (f"{found[part]:.0f} ({found[part] / profile:.2f})" for found in parts.values())
        print(f"{part:32}" + "".join(f"{cell:>20}" for cell in cells))
    results = {"profile": profile, **parts}
    print(json.dumps({"options": vars(asked), "torch": torch.__version__, "results": results}))


def _measure(
    asked: argparse.Namespace, folder: Path
) -> tuple[float, dict[str, dict[str, float]], dict[str, Schedule]]:
    """Seconds of the profile of `PROFILED` samples, and of each search the seconds by part and the schedule."""
    begun = time.process_time()
    schedule_finder.profile(
        asked.backbone, asked.dataset, out=folder / "run", samples=asked.samples, eval_samples=0
    )
    profile = (time.process_time() - begun) / asked.samples * PROFILED
    schedule_finder.load_run(folder / "run").detect()
    model = load_backbone(asked.backbone, device="cpu"), open_data(asked.dataset)
    parts, schedules = {}, {}
    for name in ["shared"] if asked.shared_only else ["own layers", "shared"]:
        shutil.copytree(folder / "run", own := folder / name)
        search = TimedSearch(Run(own), model, sharing=name == "shared")
        schedules[name] = search.solve(asked.budget, "processed")
        forwards = sum(one.forwards for one in search.measured)
        parts[name] = {**search.seconds, "all": sum(search.seconds.values())}
        print(f"{name}: {forwards:.0f} unpruned forward passes of one sample", flush=True)
    return profile, parts, schedules


if __name__ == "__main__":
    main()
