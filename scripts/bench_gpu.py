"""Runs all benchmarks that need a GPU in under nine minutes and writes one JSON file.

    python -m scripts.bench_gpu                                        # backbones by shape, bfloat16, the first GPU
    python -m scripts.bench_gpu --device cpu --backbones shape:llava-tiny --batches 1   # a dry run without a GPU

Needs torch and transformers, not the other packages of the finder. Each backbone and batch size is one benchmark; the
file is written after each, so that an interrupted call keeps its results. Benchmarks run in a second process. A
baseline that fails is recorded with its reason, and the others continue. A baseline that ends the process, or that does
not return, is left out of all later benchmarks, and its benchmark is repeated in a new process. Weights are random:
the results are latency and memory only. Goals are judged on LLaVA-1.5-7B's shape with the published schedule for 64
tokens, against the unpruned model on the same path. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from pruning_runtime import find_backbone
from schedule_finder.benchmark import choose_schedule, ran_on, run_benchmark
from schedule_finder.benchmark.baselines import SCHEDULE, SCHEDULE_FAST, UNPRUNED, UNPRUNED_FAST
from schedule_finder.files import write_text
from schedule_finder.models.shapes import build_shape
from scripts.bench_process import TIMEOUT_SECONDS, BenchProcess, Job

FORMAT = "adaptinfer-bench-gpu"
GOAL_BACKBONE = "shape:llava-1.5-7b"
PUBLISHED_SAVING = 0.613
MOST_PRUNING_SHARE, MOST_TIMES_ROOFLINE = 0.03, 1.25

# The backbone of the goals comes first; only that one has all baselines.
_OPTIONAL = ("eager, syncs", "FastV-like", "before decoder")
PLAN = [
    Job(GOAL_BACKBONE, 1, (1, 16, 128), 110.0),
    Job(GOAL_BACKBONE, 8, (1, 16), 45.0),
    Job(GOAL_BACKBONE, 32, (1, 16), 45.0),
    *(
        Job(f"shape:{name}", batch, (1, 16), 15.0, _OPTIONAL)
        for name in ("llava-1.5-13b", "llava-next-7b", "qwen2-vl-7b", "qwen2.5-vl-7b", "qwen3-vl-8b")
        for batch in (1, 8)
    ),
]


# ---- goals


def goals(benches: Sequence[dict[str, Any]], backbone: str) -> list[dict[str, Any]]:
    """Each goal with its measured value and whether it is met; batch sizes that were not run are left out.

    Goals are reported on the stock path and, if it was measured, on the fast path, and judged on the latter. The time of
    scoring and dropping is known on the stock path only.
    """
    found = []
    for bench in benches:
        if bench["backbone"]["name"] != backbone:
            continue
        by_name = {result["baseline"]: result for result in bench["results"]}
        pairs = {"stock": (SCHEDULE, UNPRUNED), "fast": (SCHEDULE_FAST, UNPRUNED_FAST)}
        paths = {
            path: (by_name[ours], by_name[full])
            for path, (ours, full) in pairs.items()
            if ours in by_name and full in by_name
        }
        last = str(bench["lengths"][-1])
        for path, (ours, full) in paths.items():
            decoder = ours["decoder_ms"]["median"]
            total = ours["total_ms"][last]["median"] / full["total_ms"][last]["median"]
            checks = [
                (
                    "decoder prefill saved, of unpruned on the same path",
                    1 - ours["same_path_ratio"]["median"],
                    ">=",
                    PUBLISHED_SAVING,
                ),
                (f"total with {last} new tokens, of unpruned on the same path", total, "<=", 1.0),
            ]
            if ours["batch"] == 8:
                checks.append(
                    (
                        "pruned prefill, times the roofline",
                        decoder / ours["roofline_ms"],
                        "<=",
                        MOST_TIMES_ROOFLINE,
                    )
                )
            judged = path == "fast" or "fast" not in paths
            found += [_goal(ours["batch"], path, judged, *check) for check in checks]
            if path == "stock":
                share = (ours["prefill"]["scoring"] + ours["prefill"]["dropping"]) / decoder
                what = "scoring and dropping, share of the pruned prefill"
                found.append(_goal(ours["batch"], path, True, what, share, "<=", MOST_PRUNING_SHARE))
    return found


def _goal(
    batch: int, path: str, judged: bool, what: str, value: float, sign: str, bound: float
) -> dict[str, Any]:
    met = value >= bound if sign == ">=" else value <= bound
    return {
        "batch": batch,
        "path": path,
        "judged": judged,
        "what": what,
        "value": value,
        "goal": f"{sign} {bound}",
        "met": met,
    }


# ---- the process that measures


def measure(jobs: Connection, device: str, schedule: str | None, fast: bool | None) -> None:
    """Run the jobs that arrive; send the name of each baseline as it runs, then the document.

    Ends after the first failure, since the state of the device is then unknown.
    """
    on = torch.device(device)
    dtype = torch.bfloat16 if on.type == "cuda" else torch.float32
    if on.type == "cpu":
        torch.set_num_threads(1)
    backbone = None
    with suppress(EOFError):
        while True:
            job: Job = jobs.recv()
            try:
                if backbone is None or backbone.name != job.backbone:
                    backbone = None
                    gc.collect()  # a model's hooks and caches refer to each other
                    backbone = find_backbone(build_shape(job.backbone, on, dtype))
                chosen, source = choose_schedule(schedule, backbone)
                document = run_benchmark(
                    backbone,
                    chosen,
                    schedule_source=source,
                    batches=[job.batch],
                    lengths=job.lengths,
                    seconds=job.seconds,
                    fast=fast,
                    without=job.without,
                    before_run=lambda name: jobs.send(("running", name)),
                )
            except Exception as error:
                traceback.print_exc()
                jobs.send(("failed", _one_line(error)))
                return
            jobs.send(("done", document))


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


# ---- the command


def _arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/gpu.json"))
    parser.add_argument("--device", default="cuda", help="default: the first GPU")
    parser.add_argument("--seconds", type=float, default=520.0, help="time limit")
    parser.add_argument("--backbones", nargs="+", help="shapes, instead of the plan's")
    parser.add_argument("--batches", nargs="+", type=int, help="instead of the plan's")
    parser.add_argument("--lengths", nargs="+", type=int, help="instead of the plan's")
    parser.add_argument("--schedule", help="file or preset, for all backbones")
    parser.add_argument(
        "--fast", action=argparse.BooleanOptionalAction, help="the fast path; default on a GPU"
    )
    return parser


def main() -> int:
    """Measure the plan, print a line for each result, write JSON."""
    options = _arguments().parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "no CUDA device: nothing measured (a dry run: --device cpu --backbones shape:llava-tiny --batches 1)"
        )
        return 2
    plan = _plan(options)
    about = options.backbones[0] if options.backbones else GOAL_BACKBONE

    begun = time.monotonic()
    arguments = (options.device, options.schedule, options.fast)
    runner = BenchProcess(
        measure,
        arguments,
        needed=(UNPRUNED, SCHEDULE),
        until=begun + options.seconds,
        timeout=TIMEOUT_SECONDS if options.device.startswith("cuda") else options.seconds,
    )
    benches: list[dict[str, Any]] = []

    def write() -> list[dict[str, Any]]:
        judged = goals(benches, about)
        document = {
            "format": FORMAT,
            "version": 1,
            "goals": judged,
            "failed": runner.failed,
            "benches": benches,
        }
        write_text(options.out, json.dumps(document) + "\n")
        return judged

    for bench in runner.documents(plan):
        benches.append(bench)
        show(bench)
        write()
    for goal in write():
        print(f"batch {goal['batch']}, {goal['path']} path: {goal['what']} {goal['value']:.3f} ({goal['goal']}): "
              f"{'met' if goal['met'] else 'NOT met'}{'' if goal['judged'] else ' (not judged)'}")  # fmt: skip
    for one in runner.failed:
        who = ", ".join(str(one[key]) for key in ("backbone", "batch", "baseline") if key in one)
        print(f"failed: {who}: {one['reason']}")
    print(
        f"{len(benches)} benches, {len(runner.failed)} failures, {time.monotonic() - begun:.0f} s: {options.out}"
    )
    return 1 if runner.failed else 0


def _plan(options: argparse.Namespace) -> list[Job]:
    """`PLAN`, or the jobs that the options name."""
    if not (options.backbones or options.batches or options.lengths):
        return PLAN
    return [
        Job(name, batch, tuple(options.lengths or (1, 16, 128)), 30.0)
        for name in options.backbones or dict.fromkeys(job.backbone for job in PLAN)
        for batch in options.batches or (1, 8)
    ]


def show(bench: dict[str, Any]) -> None:
    """Print one line per baseline."""
    print(f"{bench['backbone']['name']}: {bench['note'] or 'its own weights'}; {bench['environment']['dtype']} on "
          f"{ran_on(bench)}; {bench['prompt']['vision_tokens']} vision + {bench['prompt']['text_tokens']} text tokens; "
          f"{bench['schedule']['source']}")  # fmt: skip
    for result in bench["results"]:
        spent = [result["prefill"][part] for part in ("scoring", "dropping")]
        pruning = "inside the decoder" if None in spent else f"{sum(spent):6.2f}"
        token, same = result["token_ms"], result["same_path_ratio"]
        print(
            f"  batch {result['batch']:2d} {result['baseline']:15}"
            f" decoder {result['decoder_ms']['median']:9.2f} ms"
            f" ({100 * result['decoder_ratio']['median']:5.1f} %,"
            f" same path {100 * same['median'] if same else float('nan'):5.1f} %,"
            f" FLOPs {100 * result['flops_ratio']:5.1f} %,"
            f" roofline {result['roofline_ms']:8.2f}, scoring and dropping {pruning})"
            f" first token {result['first_token_ms']['median']:9.2f}"
            f" token {token['median'] if token else float('nan'):7.2f}"
            f" peak {result['peak_bytes'] / 1e6:7.0f} MB cache {result['cache_bytes'] / 1e6:7.1f} MB",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
