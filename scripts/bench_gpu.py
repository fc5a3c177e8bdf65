"""Everything that needs a GPU to be measured, in one call of under nine minutes, into one JSON file.

    python -m scripts.bench_gpu                                        # backbones by shape, bfloat16, the first GPU
    python -m scripts.bench_gpu --device cpu --backbones shape:llava-tiny --batches 1   # a dry run without a GPU

Needs torch, transformers and what they bring, and nothing else of the finder. Each backbone and batch size is a
`bench` of its own; the file is written after every one, so that a call that is cut off leaves what it had. A bench
that fails (memory, say) is noted with its reason, and the next goes on. Weights are random: latency and memory only.
Goals are judged on LLaVA-1.5-7B's shape with the published schedule for 64 tokens. Exit code 1 if a bench failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from pruning_runtime import find_backbone
from schedule_finder.benchmark import choose_schedule, run_benchmark
from schedule_finder.files import write_text
from schedule_finder.shapes import build_shape

FORMAT = "adaptinfer-bench-gpu"
# Backbone, batch sizes, numbers of new tokens, seconds for each batch size. What the goals are about comes first.
PLAN: list[tuple[str, list[int], list[int], float]] = [
    ("shape:llava-1.5-7b", [1, 8, 32], [1, 16, 128], 60.0),
    ("shape:llava-1.5-13b", [1, 8], [1, 16], 15.0),
    ("shape:llava-next-7b", [1, 8], [1, 16], 15.0),
    ("shape:qwen2-vl-7b", [1, 8], [1, 16], 15.0),
    ("shape:qwen2.5-vl-7b", [1, 8], [1, 16], 15.0),
    ("shape:qwen3-vl-8b", [1, 8], [1, 16], 15.0),
]
GOAL_BACKBONE = "shape:llava-1.5-7b"
PUBLISHED_SAVING = 0.613
MOST_PRUNING_SHARE, MOST_TIMES_ROOFLINE = 0.03, 1.25


def goals(benches: list[dict[str, Any]], backbone: str) -> list[dict[str, Any]]:
    """What was asked for, what was measured, and whether it is met; batch sizes that were not run are left out."""
    found = []
    for bench in benches:
        if bench["backbone"]["name"] != backbone:
            continue
        by_name = {result["competitor"]: result for result in bench["results"]}
        ours, full = by_name["schedule"], by_name["unpruned"]
        batch, decoder = ours["batch"], ours["decoder_ms"]["median"]
        pruning = ours["prefill"]["scoring"]["median"] + ours["prefill"]["dropping"]["median"]
        bound = by_name["oracle"]["roofline_ms"]
        last = str(bench["lengths"][-1])
        checks = [
            ("decoder prefill saved", 1 - ours["decoder_ratio"]["median"], ">=", PUBLISHED_SAVING),
            (
                "scoring and dropping, share of the pruned prefill",
                pruning / decoder,
                "<=",
                MOST_PRUNING_SHARE,
            ),
            (
                f"total with {last} new tokens, of unpruned",
                ours["total_ms"][last]["median"] / full["total_ms"][last]["median"],
                "<=",
                1.0,
            ),
        ]
        if batch == 8:
            checks.append(("pruned prefill, times the roofline", decoder / bound, "<=", MOST_TIMES_ROOFLINE))
        for what, value, sign, goal in checks:
            met = value >= goal if sign == ">=" else value <= goal
            found.append({"batch": batch, "what": what, "value": value, "goal": f"{sign} {goal}", "met": met})
    return found


def main() -> int:
    """Measure the plan, print a line for each result, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/gpu.json"))
    parser.add_argument("--device", default="cuda", help="default: the first GPU")
    parser.add_argument("--seconds", type=float, default=480.0, help="no new bench is begun after so long")
    parser.add_argument("--backbones", nargs="+", help="shapes, instead of the plan's")
    parser.add_argument("--batches", nargs="+", type=int, help="instead of the plan's")
    parser.add_argument("--lengths", nargs="+", type=int, help="instead of the plan's")
    parser.add_argument("--schedule", help="file or preset, for all backbones")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "no CUDA device: nothing measured (a dry run: --device cpu --backbones shape:llava-tiny --batches 1)"
        )
        return 2
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cpu":
        torch.set_num_threads(1)
    plan = PLAN
    if options.backbones:
        plan = [(name, [1, 8], [1, 16, 128], 30.0) for name in options.backbones]
    plan = [
        (name, options.batches or batches, options.lengths or lengths, seconds)
        for name, batches, lengths, seconds in plan
    ]

    begun, benches, failed = time.monotonic(), [], []
    for name, batches, lengths, seconds in plan:
        backbone = None
        for batch in batches:
            left = options.seconds - (time.monotonic() - begun)
            if left <= 0:
                failed.append({"backbone": name, "batch": batch, "reason": "no time left"})
                continue
            try:
                backbone = backbone or find_backbone(build_shape(name, device, dtype))
                schedule, source = choose_schedule(options.schedule, backbone)
                bench = run_benchmark(
                    backbone,
                    schedule,
                    schedule_source=source,
                    batches=[batch],
                    lengths=lengths,
                    seconds=min(seconds, left),
                )
                benches.append(bench)
                show(bench)
            except Exception as error:
                traceback.print_exc()
                failed.append(
                    {"backbone": name, "batch": batch, "reason": f"{type(error).__name__}: {error}"}
                )
                print(f"{name} batch {batch} failed: {failed[-1]['reason']}", flush=True)
            judged = goals(benches, options.backbones[0] if options.backbones else GOAL_BACKBONE)
            document = {"format": FORMAT, "version": 1, "goals": judged, "failed": failed, "benches": benches}
            write_text(options.out, json.dumps(document) + "\n")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        backbone = None
        gc.collect()  # a model's hooks and caches refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    for goal in judged:
        print(f"batch {goal['batch']}: {goal['what']} {goal['value']:.3f} ({goal['goal']}): "
              f"{'met' if goal['met'] else 'NOT met'}")  # fmt: skip
    print(f"{len(benches)} benches, {len(failed)} failed, {time.monotonic() - begun:.0f} s: {options.out}")
    return 1 if failed else 0


def show(bench: dict[str, Any]) -> None:
    """A line for each competitor."""
    environment = bench["environment"]
    print(f"{bench['backbone']['name']}: {bench['note'] or 'its own weights'}; {environment['dtype']} on "
          f"{environment['device_name'] or environment['device']}; {bench['prompt']}; "
          f"{bench['schedule']['source']}")  # fmt: skip
    for result in bench["results"]:
        pruning = sum(result["prefill"][part]["median"] for part in ("scoring", "dropping"))
        token = result["token_ms"]
        print(
            f"  batch {result['batch']:2d} {result['competitor']:15}"
            f" decoder {result['decoder_ms']['median']:9.2f} ms"
            f" ({100 * result['decoder_ratio']['median']:5.1f} %, FLOPs {100 * result['flops_ratio']:5.1f} %,"
            f" roofline {result['roofline_ms']:8.2f}, scoring and dropping {pruning:6.2f})"
            f" first token {result['first_token_ms']['median']:9.2f}"
            f" token {token['median'] if token else float('nan'):7.2f}"
            f" peak {result['peak_bytes'] / 1e6:7.0f} MB cache {result['cache_bytes'] / 1e6:7.1f} MB",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
