"""The benchmarks of `make bench` in turn, and their numbers in one JSON file, for `scripts.compare_bench`.

    python -m scripts.bench_all --out outputs/bench/cpu.json
    python -m scripts.bench_all --only scorers detectors

Every benchmark measures its own methods in one interleaved run; the file only collects them. Numbers of two files compare
only if the machine was as busy, so compare ratios within a file first. Times are of one CPU thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from schedule_finder.files import write_text

FORMAT = "adaptinfer-bench"
COMMANDS: dict[str, tuple[str, ...]] = {
    "runtime": ("schedule_finder", "bench", "shape:llava-tiny", "--device", "cpu", "--threads", "1"),
    "profile": ("scripts.bench_profile", "--repeats", "3"),
    "scorers": ("scripts.bench_scorers",),
    "detectors": ("scripts.bench_detectors", "--time"),
}
"""Module and arguments; all but ``runtime``, which writes a file, print one JSON document as their last line."""


def main() -> int:
    """Run the benchmarks and write the file; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/cpu.json"))
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    asked = parser.parse_args()
    document: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "benchmarks": {},
    }
    failed = []
    for name in asked.only:
        result = run(name)
        if result is None:
            failed.append(name)
        else:
            document["benchmarks"][name] = result
    write_text(asked.out, json.dumps(document, indent=1) + "\n")
    print(f"{asked.out}: {', '.join(document['benchmarks'])}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def run(name: str) -> Any:
    """The document of a benchmark, whose table goes to the terminal; None where it failed."""
    command = [sys.executable, "-m", *COMMANDS[name]]
    with tempfile.TemporaryDirectory() as folder:
        if name == "runtime":
            command += ["--out", folder]
        print(f"== {name}: {' '.join(COMMANDS[name])}", flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        lines = done.stdout.splitlines()
        print("\n".join(lines if name == "runtime" else lines[:-1]), flush=True)
        if done.returncode:
            return None
        return json.loads((Path(folder) / "bench.json").read_text() if name == "runtime" else lines[-1])


if __name__ == "__main__":
    sys.exit(main())
