"""What stands in for a measuring process where only the one that waits for it is tested; imports nothing heavy."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any


def works(jobs: Any, folder: str) -> None:
    """What `scripts.bench_gpu.measure` does, but for measuring: in some jobs some rival does not come back."""
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
