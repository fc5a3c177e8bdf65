"""A measuring process without models, for tests of the process that waits for it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any


def works(jobs: Any, folder: str) -> None:
    """Answers jobs as `scripts.bench_gpu.measure` does, without measuring; some baselines of some jobs fail."""
    process = len(list(Path(folder).iterdir()))
    (Path(folder) / str(process)).touch()
    while True:
        job = jobs.recv()
        for name in ("unpruned", "schedule", "no-scoring bound", "before decoder", "schedule, fast"):
            if name in job.without:
                continue
            jobs.send(("running", name))
            match job.backbone, name:
                case "exits", "no-scoring bound":
                    os._exit(7)
                case "killed", "before decoder":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hangs", "schedule, fast":
                    time.sleep(1000)
                case "raises", "unpruned":
                    jobs.send(("failed", "InputError: no"))
                    return
        failed = (
            [{"batch": job.batch, "baseline": "x", "reason": "in the bench"}] if job.backbone == "x" else []
        )
        jobs.send(
            ("done", {"name": job.backbone, "process": process, "without": job.without, "failed": failed})
        )
