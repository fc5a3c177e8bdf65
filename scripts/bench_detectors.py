"""How often do the detectors find planted change points and isolated layers, and how fast are they?

Each case is a stock LLaVA (`tests/support/planted.py`) of 12 to 80 layers whose attention moves at 1 to 4 known
layers, with 0 to 3 isolated layers, or not at all. It goes through the whole path: forward, profile, detect. A case
counts as found if every boundary has a change point within one layer and there is no other; its isolated layers
count as named if all of them are reported.

Run from the repository root:

    python -m scripts.bench_detectors
    python -m scripts.bench_detectors --seeds 10 --condition "noise 1"

The last line of stdout is one compact JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import ruptures
import torch

from pruning_runtime.backbone import find_backbone
from schedule_finder.change_points import DETECTORS, AttentionShift, TokenCurve, get_detector
from schedule_finder.change_points.token_curve import single_breaks
from schedule_finder.profiling.capture import profile_batch
from tests.support.planted_cases import CONDITIONS, Condition, plant, random_truth, same_boundaries

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    """Print the tables, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=50, help="cases per row")
    parser.add_argument("--samples", type=int, default=32, help="samples per case")
    parser.add_argument("--condition", choices=CONDITIONS, help="only this one")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = {options.condition: CONDITIONS[options.condition]} if options.condition else CONDITIONS

    print(
        f"% of {options.seeds} cases: boundaries found (attention_shift, token_curve), isolated layers named,"
    )
    print("cases in which a layer that is not isolated is reported as such")
    print(f"{'condition':26} {'shifts':>6} {'shift':>6} {'curve':>6} {'named':>6} {'falsely':>8}")
    rows = []
    for name, condition in chosen.items():
        for shifts in (False, True):
            rows.append(recovery(condition, shifts=shifts, seeds=options.seeds, num_samples=options.samples))
            print(format_row(name, rows[-1]), flush=True)
            rows[-1]["condition"] = name
    timings = time_detectors()
    for what, seconds in timings.items():
        print(f"{seconds:8.2f} s  {what}")
    print(json.dumps({"recovery": rows, "seconds": timings}, separators=(",", ":")))


def recovery(
    condition: Condition,
    *,
    shifts: bool,
    seeds: int,
    num_samples: int,
    layers: tuple[int, int] = (12, 80),
) -> dict[str, Any]:
    """Shares of cases in [0, 1] under one condition, with or without ``shifts``."""
    shift = AttentionShift(simulations=100, resamples=20)
    found: dict[str, list[bool]] = {"attention_shift": [], "token_curve": [], "named": [], "falsely": []}
    for seed in range(seeds):
        truth = random_truth(np.random.default_rng([seed, int(shifts)]), shifts=shifts, layers=layers)
        planted = plant(truth, condition, 1000 * shifts + seed)
        batch = planted.make_batch(num_samples, seed)
        maps = [row.scores["uniform_text"] for row in profile_batch(find_backbone(planted.model), batch)]
        detected = shift.detect(maps, seed=seed)
        isolated = {layer.layer for layer in detected.isolated_layers}
        curve = TokenCurve(shuffles=30).detect(maps, seed=seed)
        found["attention_shift"].append(same_boundaries(detected.change_points, truth))
        found["token_curve"].append(same_boundaries(curve.change_points, truth))
        found["named"].append(isolated >= set(truth.isolated))
        found["falsely"].append(bool(isolated - set(truth.isolated)))
    return {"shifts": shifts, "cases": seeds} | {name: float(np.mean(hits)) for name, hits in found.items()}


def format_row(name: str, row: dict[str, Any]) -> str:
    """One line of the recovery table."""
    shares = (100 * row[key] for key in ("attention_shift", "token_curve", "named", "falsely"))
    numbers = " ".join(f"{share:{width}.0f}" for share, width in zip(shares, (6, 6, 6, 8), strict=True))
    return f"{name:26} {'yes' if row['shifts'] else 'no':>6} {numbers}"


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
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
