"""Time and memory of the commands that read a profile, on synthetic profiles of any size.

    python -m scripts.bench_scale --samples 100000 --layers 32 --tokens 576
    python -m scripts.bench_scale --samples 1000 --layers 80 --tokens 4096

Writes a profile of that size, whose attention moves at two layers and whose ids are in no order, into a temporary
folder (37 KB for each sample, score and 32 layers of 576 tokens). Then `detect` and `schedule --solver retained` run as
processes of their own. Processor time and peak memory are those of each process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pruning_runtime.geometry import DecoderShape
from schedule_finder.profiling.fields import CURVE_FIELDS, SCORE_FIELDS, ProfileRow
from schedule_finder.profiling.manifest import Manifest
from schedule_finder.run.folder import Run
from schedule_finder.samples import SampleEntry
from schedule_finder.samples.entries import write_entries

SHARD = 64
"""Samples of a shard, as in a profile."""
COMMANDS = (
    ("detect",),
    ("schedule", "--solver", "retained", "--budget", "25%", "--no-model"),
    ("inspect",),
)


def main() -> None:
    """Write a profile, run the commands, print a table and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=576)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    asked = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        run = Run.begin(Path(folder) / "run", "bench_scale", _options(asked.samples))
        begun = time.process_time()
        written = write_profile(run, asked.samples, asked.layers, asked.tokens)
        print(
            f"profile: {written / 2**30:.1f} GB, written in {time.process_time() - begun:.0f} s", flush=True
        )
        for command in COMMANDS:
            seconds, megabytes = _measured([command[0], str(run.folder), *command[1:]])
            results.append({"command": command[0], "seconds": seconds, "megabytes": megabytes})
            print(f"{command[0]:10} {seconds:8.1f} s {megabytes:8.0f} MB", flush=True)
        found = json.loads(run.change_points.read_text())["detectors"]["attention_shift"]
        print("change points:", [change["layer"] for change in found["changes"]])
    sizes = {name: getattr(asked, name) for name in ("samples", "layers", "tokens")}
    print(json.dumps({"options": sizes, "bytes": written, "results": results}))


def _options(samples: int) -> dict[str, Any]:
    columns = dict.fromkeys(("split", "image_column", "question_column", "answer_column"))
    return {
        "backbone": "demo",
        "dataset": "demo",
        "samples": samples,
        "eval_samples": 1,
        "seed": 0,
        "columns": columns,
    }


def write_profile(run: Run, samples: int, layers: int, tokens: int) -> int:
    """A profile whose attention moves at a third and two thirds of the depth; returns its bytes."""
    rng = np.random.default_rng(0)
    names = [f"synthetic:{row:06d}" for row in rng.permutation(samples)]
    entries = [
        SampleEntry(id=name, source="demo", row=row, use="calibration") for row, name in enumerate(names)
    ]
    write_entries(run.samples, entries)
    shape = DecoderShape(
        num_layers=layers,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        intermediate_size=11008,
        vocab_size=32000,
    )
    backbone = {"name": "demo", "model_type": "llava", "num_layers": layers, "revision": None}
    meta = {"backbone": backbone, "shape": asdict(shape), "layers": list(range(layers)), "dtype": "float32"}
    run.profile.open({**meta, "prompt_digest": "sha256:0"})
    regime = np.searchsorted((layers // 3, 2 * layers // 3), np.arange(layers), side="right")
    for first in range(0, samples, SHARD):
        some = names[first : first + SHARD]
        logits = rng.standard_normal((len(some), 3, tokens), dtype=np.float32)[:, regime]
        logits += 0.3 * rng.standard_normal(logits.shape, dtype=np.float32)
        attention = np.exp(logits)
        attention *= 0.4 / attention.sum(-1, keepdims=True)
        curves = {name: np.full(layers, 0.4, np.float32) for name in CURVE_FIELDS}
        rows = [
            ProfileRow(tokens, 20, 40, dict.fromkeys(SCORE_FIELDS, sample), curves) for sample in attention
        ]
        run.profile.append(some, rows)
    return sum(facts["bytes"] for facts in (Manifest(run.profile.folder).listed() or {}).values())


def _measured(command: list[str]) -> tuple[float, float]:
    """Processor seconds and peak memory in MB of one command."""
    code = "import sys; from schedule_finder.__main__ import main; sys.argv[0] = 'adaptinfer-profile'; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
