"""How often do the detectors find planted change points and isolated layers, and how fast are they?

Each case is a stock LLaVA (`tests/support/planted.py`) of 12 to 80 layers whose attention moves at 1 to 4 known
layers, with 0 to 3 isolated layers, or not at all. It goes through the whole path: forward, profile, detect. A case
counts as found if every boundary has a change point within one layer and there is no other; its isolated layers
count as named if all of them are reported.

Run from the repository root:

    python -m scripts.bench_detectors --old 19d3af0 --out rows.jsonl   # the table of record; continues after a stop
    python -m scripts.bench_detectors --seeds 10 --condition "noise 1"
    python -m scripts.bench_detectors --sensitivity --seeds 12 --first-seed 300000
    python -m scripts.bench_detectors --time

The last line of stdout is one compact JSON document. ``--old`` measures the detector of 2026-11-22 beside the others,
with the code of the given commit (19d3af0 is the last one that has it).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ruptures
import torch

from pruning_runtime.backbone import find_backbone
from schedule_finder.change_points import DETECTORS, AttentionShift, TokenCurve, get_detector
from schedule_finder.change_points.token_curve import single_breaks
from schedule_finder.profiling.capture import profile_batch
from scripts.detector_constants import print_sensitivity
from tests.support.planted_cases import CONDITIONS, Condition, Truth, plant, random_truth, same_boundaries

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FIRST_SEED = 200_000
"""Seeds of the table of record. No constant was chosen on them: 0 to 49 and 100000 to 100049 served for that."""


def main() -> None:
    """Print the tables, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=50, help="cases per row")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--samples", type=int, default=32, help="samples per case")
    parser.add_argument("--condition", choices=CONDITIONS, help="only this one")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--old", metavar="COMMIT", help="measure the detector of 2026-11-22 too")
    parser.add_argument(
        "--out", type=Path, help="append rows here as JSON lines; rows that it has are not redone"
    )
    parser.add_argument("--sensitivity", action="store_true", help="only: half and double of every constant")
    parser.add_argument("--time", action="store_true", help="only: seconds for the sizes that matter")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.sensitivity:
        rows = print_sensitivity(options.first_seed, options.seeds, planted_cases)
        print(json.dumps({"sensitivity": rows}, separators=(",", ":")))
        return
    if options.time:
        timings = time_detectors()
        for what, seconds in timings.items():
            print(f"{seconds:8.2f} s  {what}")
        print(json.dumps({"seconds": timings}, separators=(",", ":")))
        return
    print(json.dumps({"recovery": print_recovery(options)}, separators=(",", ":")))


def print_recovery(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The recovery table, row by row."""
    chosen = {options.condition: CONDITIONS[options.condition]} if options.condition else CONDITIONS
    old = load_old(options.old) if options.old else None
    known = read_rows(options.out)
    print(
        f"% of {options.seeds} cases: boundaries found (attention_shift, old, token_curve), isolated layers named,"
    )
    print("cases in which a layer that is not isolated is reported as such")
    print(f"{'condition':26} {'shifts':>6} {'shift':>6} {'old':>6} {'curve':>6} {'named':>6} {'falsely':>8}")
    rows = []
    for name, condition in chosen.items():
        for shifts in (False, True):
            of = {
                "condition": name,
                "shifts": shifts,
                "cases": options.seeds,
                "first_seed": options.first_seed,
            }
            row = next((one for one in known if all(one[key] == of[key] for key in of)), None)
            if row is None:
                row = of | recovery(
                    condition,
                    shifts=shifts,
                    seeds=options.seeds,
                    num_samples=options.samples,
                    first_seed=options.first_seed,
                    old=old,
                )
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
            rows.append(row)
            print(format_row(name, row), flush=True)
    return rows


def read_rows(path: Path | None) -> list[dict[str, Any]]:
    """Rows of an earlier run; none without a file."""
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def planted_cases(
    condition: Condition,
    shifts: bool,
    seeds: Sequence[int],
    num_samples: int = 32,
    layers: tuple[int, int] = (12, 80),
) -> list[tuple[int, Truth, list[np.ndarray]]]:
    """Seed, truth and attention maps of each case."""
    cases = []
    for seed in seeds:
        truth = random_truth(np.random.default_rng([seed, int(shifts)]), shifts=shifts, layers=layers)
        planted = plant(truth, condition, 1000 * shifts + seed)
        batch = planted.make_batch(num_samples, seed)
        maps = [row.scores["uniform_text"] for row in profile_batch(find_backbone(planted.model), batch)]
        cases.append((seed, truth, maps))
    return cases


def recovery(
    condition: Condition,
    *,
    shifts: bool,
    seeds: int,
    num_samples: int,
    layers: tuple[int, int] = (12, 80),
    first_seed: int = FIRST_SEED,
    old: Callable[[Sequence[np.ndarray], int], list[int]] | None = None,
) -> dict[str, Any]:
    """Shares of cases in [0, 1] under one condition, with or without ``shifts``."""
    shift = AttentionShift(simulations=100, resamples=20)
    found: dict[str, list[bool]] = {"attention_shift": [], "token_curve": [], "named": [], "falsely": []}
    if old is not None:
        found["old"] = []
    for one in range(first_seed, first_seed + seeds):
        ((seed, truth, maps),) = planted_cases(condition, shifts, [one], num_samples, layers)
        detected = shift.detect(maps, seed=seed)
        isolated = {layer.layer for layer in detected.isolated_layers}
        curve = TokenCurve(shuffles=30).detect(maps, seed=seed)
        found["attention_shift"].append(same_boundaries(detected.change_points, truth))
        found["token_curve"].append(same_boundaries(curve.change_points, truth))
        found["named"].append(isolated >= set(truth.isolated))
        found["falsely"].append(bool(isolated - set(truth.isolated)))
        if old is not None:
            found["old"].append(same_boundaries(old(maps, seed), truth))
    return {"shifts": shifts, "cases": seeds} | {name: float(np.mean(hits)) for name, hits in found.items()}


def format_row(name: str, row: dict[str, Any]) -> str:
    """One line of the recovery table."""
    widths = {"attention_shift": 6, "old": 6, "token_curve": 6, "named": 6, "falsely": 8}
    numbers = " ".join(
        f"{100 * row[key]:{width}.0f}" if key in row else " " * width for key, width in widths.items()
    )
    return f"{name:26} {'yes' if row['shifts'] else 'no':>6} {numbers}"


def load_old(commit: str) -> Callable[[Sequence[np.ndarray], int], list[int]]:
    """The detector of 2026-11-22: maps and a seed -> change points, with the code of ``commit``."""
    path = "schedule_finder/change_points.py"
    source = subprocess.run(
        ["git", "show", f"{commit}:{path}"], check=True, capture_output=True, text=True
    ).stdout
    module = types.ModuleType("old_change_points")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(source, f"{commit}:{path}", "exec"), module.__dict__)
    detector = next(
        getattr(module, name) for name in ("DistributionShift", "AttentionShift") if hasattr(module, name)
    )()
    return lambda maps, seed: [int(layer) for layer in detector.detect(maps, seed=seed).change_points]


def time_detectors() -> dict[str, float]:
    """Seconds for the sizes that matter, on random attention."""
    rng = np.random.default_rng(0)
    curves = np.cumsum(rng.random((58 * 1000, 32)), axis=1)
    few = curves[:1000]
    search = ruptures.Binseg(model="l2", jump=1, min_size=2)

    def binseg() -> None:
        slow = [search.fit(curve).predict(n_bkps=1)[0] for curve in few]
        if slow != single_breaks(few).tolist():
            raise SystemExit("single_breaks and ruptures.Binseg disagree")

    timings = {
        "ruptures.Binseg, 1000 curves x 32 layers (times 58 for 1000 samples)": _seconds(binseg),
        "single_breaks, 58000 curves x 32 layers": _seconds(lambda: single_breaks(curves)),
    }
    for layers in (32, 80):
        maps = [rng.random((layers, 576), dtype=np.float32) for _ in range(1000)]
        for name in DETECTORS:
            size = f"{name}, 1000 samples x {layers} layers x 576 tokens"
            timings[size] = _seconds(lambda n=name, m=maps: get_detector(n).detect(m))
    return timings


def _seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process: a busy machine does not enter."""
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
