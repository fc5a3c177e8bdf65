"""A process that searches and evaluates in children that can be killed: all imports are paid once.

    python -m tests.support.interrupted_measuring CHECKPOINT DATA OUT KILLS SEED

Each child runs the steps `schedule` and `evaluate` on the same profile; one after the other is killed with SIGKILL
at a random moment, until as many were killed as asked for; a last one is left alone. The last line of stdout says
how many children were killed, and how many units were on disk at each kill.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tests.conftest  # noqa: F401  (a torchvision that imports)
from schedule_finder import pipeline
from schedule_finder.models.loading import load_backbone
from schedule_finder.profiling.engines.base import BatchLimits
from schedule_finder.profiling.engines.local import LocalEngine
from schedule_finder.run.folder import Run
from schedule_finder.samples import open_data
from schedule_finder.search import Search

BATCH = 4


def units(run: Run) -> list[str]:
    """The keys of all units on disk, of both steps."""
    keys = []
    for folder in (run.measurements, run.evaluation_parts):
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    keys.append(folder.name + json.dumps(json.loads(line)["key"], sort_keys=True))
                except (ValueError, KeyError):
                    continue  # the context, or a line that was cut off
    return keys


def main() -> None:
    """Kill and restart."""
    checkpoint, source, out, kills, seed = sys.argv[1:]
    loaded, data = load_backbone(checkpoint, device="cpu"), open_data(source)
    options = {"samples": 16, "eval_samples": 12, "seed": 0, "dataset": source, "columns": {}}
    profiled = Run.begin(Path(out) / "profiled", "test", options)
    engine = LocalEngine(loaded, data, BatchLimits(samples=8, tokens=400))
    pipeline.profile_step(profiled, engine, data, lambda done, total: None, report=print)
    pipeline.detect_step(profiled)

    def measure(folder: Path) -> None:
        run = Run(folder)
        pipeline.schedule_step(run, Search(run, (loaded, data), batch_size=BATCH), budget=0.4)
        pipeline.evaluate_step(
            run, loaded, data, lambda done, total: None, batch_size=BATCH, max_new_tokens=3, baselines="all"
        )

    whole, killed = Path(out) / "whole", Path(out) / "killed"
    shutil.copytree(profiled.folder, whole)
    begun = time.monotonic()
    measure(whole)
    interrupt(lambda: measure(killed), profiled, Run(killed), int(kills), int(seed), time.monotonic() - begun)


def interrupt(
    step: Callable[[], None], profiled: Run, run: Run, kills: int, seed: int, seconds: float
) -> None:
    """Run ``step`` in children; together they have twice the time that it takes."""
    rng, stored, longest = random.Random(seed), [], 4 * seconds / max(1, kills)
    shutil.copytree(profiled.folder, run.folder)
    while True:
        child = os.fork()
        if child == 0:
            step()
            os._exit(0)
        if len(stored) < kills:
            time.sleep(rng.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            keys = units(run)
            assert len(keys) == len(set(keys)), "a unit was measured twice"
            stored.append(len(keys))
            continue
        assert os.WEXITSTATUS(status) == 0
        if len(stored) == kills:
            break
        # Done before it could be killed as often as asked for: from the start, with earlier kills.
        shutil.rmtree(run.folder)
        shutil.copytree(profiled.folder, run.folder)
        stored, longest = [], longest / 2
    print(json.dumps({"killed": len(stored), "stored": stored}))


if __name__ == "__main__":
    main()
