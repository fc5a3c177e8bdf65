"""How often do the detectors find planted change points, and how fast are they?

Each case is a stock LLaVA (`tests/support/planted.py`) of 12 to 40 layers whose attention moves at 0 to 4 known
layers, at least 3 layers apart where they fit. It goes through the whole path: forward, profile, detect.
A case counts as found when every boundary has a change point within one layer and there is no other.

Noise is in nats on the attention logits (`planted_llava`), which says little by itself; so each row also
measures it as users would meet it: the divergence of neighbouring layers inside a regime (`inside`) and
across a boundary (`across`), medians in bits, and their ratio.

Run from the repository root:

    python -m scripts.bench_detectors
    python -m scripts.bench_detectors --seeds 10 --noise 1 --drift 0

The very last line of stdout is one compact JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import ruptures
import torch

from pruning_runtime.backbone import find_backbone
from schedule_finder.change_points import (
    DETECTORS,
    Detector,
    DistributionShift,
    TokenCurve,
    get_detector,
    single_breaks,
)
from schedule_finder.profiling.capture import profile_batch
from schedule_finder.signals import layer_shift
from tests.support.planted import planted_llava, random_boundaries, recovered

if TYPE_CHECKING:
    from collections.abc import Callable

NOISE_AND_DRIFT = [
    (0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (1.25, 0.0), (1.5, 0.0), (2.0, 0.0),
    (0.0, 0.15), (0.0, 0.3), (0.0, 0.5), (1.0, 0.15),
]  # fmt: skip
MAX_BOUNDARIES = 4


def main() -> None:
    """Print the tables, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=50, help="cases per number of boundaries")
    parser.add_argument("--samples", type=int, default=16, help="samples per case")
    parser.add_argument("--noise", type=float, help="only this noise, in nats (with --drift)")
    parser.add_argument("--drift", type=float, default=0.0, help="drift per layer, in nats (with --noise)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    levels = NOISE_AND_DRIFT if options.noise is None else [(options.noise, options.drift)]

    print(f"found, % of {options.seeds} cases, by number of boundaries 0/1/2/3/4; 12 to 40 layers")
    print(
        f"{'noise':>5} {'drift':>5} {'inside':>7} {'across':>7} {'ratio':>6}",
        *(f"{n:>22}" for n in DETECTORS),
    )
    rows = []
    for noise, drift in levels:
        rows.append(recovery(noise, drift, options.seeds, options.samples))
        print(format_row(rows[-1]), flush=True)
    timings = time_detectors()
    for what, seconds in timings.items():
        print(f"{seconds:8.2f} s  {what}")
    print(json.dumps({"recovery": rows, "seconds": timings}, image_newlines=(",", ":")))


def recovery(noise: float, drift: float, seeds: int, num_samples: int) -> dict[str, Any]:
    """Share of cases found at one level of noise, per detector and number of boundaries."""
    # Resamples feed the evidence, not the change points.
    detectors: list[Detector] = [DistributionShift(resamples=1), TokenCurve()]
    found: dict[str, list[list[bool]]] = {d.name: [[] for _ in range(MAX_BOUNDARIES + 1)] for d in detectors}
    inside: list[float] = []
    across: list[float] = []
    for count in range(MAX_BOUNDARIES + 1):
        for seed in range(seeds):
            rng = np.random.default_rng([seed, count])
            num_layers = int(rng.integers(12, 41))
            boundaries = random_boundaries(num_layers, count, rng)
            planted = planted_llava(num_layers, boundaries, noise, 1000 * count + seed, drift=drift)
            batch = planted.make_batch(num_samples, seed)
            maps = [row.scores["uniform_text"] for row in profile_batch(find_backbone(planted.model), batch)]
            shift = layer_shift(maps).mean(axis=0)
            gaps = np.array(boundaries, dtype=int) - 1
            across += shift[gaps].tolist()
            inside += np.delete(shift, gaps).tolist()
            for detector in detectors:
                detected = detector.detect(maps, seed=seed).change_points
                found[detector.name][count].append(recovered(detected, boundaries))
        if sys.stderr.isatty():
            said = f"noise {noise:g}, drift {drift:g}: up to {count} of {MAX_BOUNDARIES} boundaries"
            print(said, end="\r", file=sys.stderr)
    return {
        "noise_nats": noise,
        "drift_nats": drift,
        "inside_bits": float(np.median(inside)),
        "across_bits": float(np.median(across)),
        "ratio": float(np.median(inside) / np.median(across)),
        "cases": seeds,
        "found": {name: [float(np.mean(f)) for f in by_count] for name, by_count in found.items()},
    }


def format_row(row: dict[str, Any]) -> str:
    """One line of the recovery table."""
    numbers = f"{row['noise_nats']:5.2f} {row['drift_nats']:5.2f} {row['inside_bits']:7.4f} "
    numbers += f"{row['across_bits']:7.4f} {row['ratio']:6.3f}"
    shares = ("/".join(f"{100 * f:.0f}" for f in by_count) for by_count in row["found"].values())
    return " ".join([numbers, *(f"{s:>22}" for s in shares)])


def time_detectors() -> dict[str, float]:
    """Seconds for the sizes that matter, on random attention."""
    rng = np.random.default_rng(0)
    curves = np.cumsum(rng.random((58 * 1000, 32)), axis=1)
    maps = [rng.random((32, 576), dtype=np.float32) for _ in range(1000)]
    few = curves[:1000]
    search = ruptures.Binseg(model="l2", jump=1, min_size=2)

    def binseg() -> None:
        slow = [search.fit(curve).predict(n_bkps=1)[0] for curve in few]
        if slow != single_breaks(few).tolist():
            raise SystemExit("single_breaks and ruptures.Binseg disagree")

    return {
        "ruptures.Binseg, 1000 curves x 32 layers (times 58 for 1000 samples)": _seconds(binseg),
        "single_breaks, 58000 curves x 32 layers": _seconds(lambda: single_breaks(curves)),
    } | {
        f"{name}, 1000 samples x 32 layers x 576 tokens": _seconds(
            lambda n=name: get_detector(n).detect(maps)
        )
        for name in DETECTORS
    }


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
