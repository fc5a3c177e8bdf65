"""A process that profiles a tiny backbone in children that can be killed: all imports are paid once.

    python -m tests.support.interrupted_profile CHECKPOINT DATA OUT SAMPLES KILLS SEED

Each child gives the same command; one after the other is killed with SIGKILL at a random moment, until as many
were killed as asked for; a last one is left alone. The last line of stdout says how many children were killed,
and after how many samples.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import tests.conftest  # noqa: F401  (a torchvision that imports)
from schedule_finder import pipeline
from schedule_finder.models.loading import load_backbone
from schedule_finder.profiling.engines.base import BatchLimits
from schedule_finder.profiling.engines.local import LocalEngine
from schedule_finder.run.folder import Run
from schedule_finder.samples import open_data

LIMITS = BatchLimits(samples=8, tokens=200)


def main() -> None:
    """Kill and restart."""
    checkpoint, source, out, samples, kills, seed = sys.argv[1:]
    loaded, data = load_backbone(checkpoint, device="cpu"), open_data(source)
    options = {"samples": int(samples), "eval_samples": 2, "seed": 0, "dataset": source, "columns": {}}

    def profile(folder: Path) -> float:
        begun = time.monotonic()
        run = Run.begin(folder, "test", options)
        engine = LocalEngine(loaded, data, LIMITS)
        pipeline.profile_step(run, engine, data, lambda done, total: None, report=print)
        return time.monotonic() - begun

    rng, killed, stored = random.Random(int(seed)), 0, []
    # Twice as long as the step takes, in all: what is done in vain is more than half of it.
    longest = 4 * profile(Path(out) / "whole") / max(1, int(kills))
    folder = Path(out) / "killed"
    while True:
        child = os.fork()
        if child == 0:
            profile(folder)
            os._exit(0)
        if killed < int(kills):
            time.sleep(rng.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            if killed == int(kills):
                break
            # Done before it could be killed as often as asked for: from the start, with earlier kills.
            shutil.rmtree(folder)
            killed, stored, longest = 0, [], longest / 2
            continue
        killed += 1
        stored.append(len(Run(folder).profile.ids()))
    print(json.dumps({"killed": killed, "stored": stored}))


if __name__ == "__main__":
    main()
