"""Latency and memory by part, of a schedule and its baselines in the same run.

All baselines get the same inputs, in rounds whose order rotates, so that a machine that slows down affects all of
them. `generate` is timed with a fixed number of new tokens: its first forward is the prefill, the others are decoding.
Every interval belongs to exactly one part, so that the parts of a run add up to its total.

Needs torch, transformers and the runtime only, not the other packages of the finder.
"""

from __future__ import annotations

from schedule_finder.benchmark.choose_schedule import choose_schedule
from schedule_finder.benchmark.clock import DECODE_PARTS, PREFILL_PARTS
from schedule_finder.benchmark.measure import run_benchmark
from schedule_finder.benchmark.report import ran_on, write_benchmark
from schedule_finder.benchmark.summary import faster_text

__all__ = [
    "DECODE_PARTS",
    "PREFILL_PARTS",
    "choose_schedule",
    "faster_text",
    "ran_on",
    "run_benchmark",
    "write_benchmark",
]
