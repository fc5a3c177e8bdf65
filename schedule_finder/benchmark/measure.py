"""All competitors on the same inputs, in rounds; the result is one document."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from pruning_runtime import Schedule
from pruning_runtime.accounting import prefill_flops
from pruning_runtime.backbone import Backbone
from schedule_finder.benchmark.competitors import competitors
from schedule_finder.benchmark.memory import peak_bytes
from schedule_finder.benchmark.one_run import Bench, Run
from schedule_finder.benchmark.roofline import Rates, measure_rates, roofline_ms
from schedule_finder.benchmark.summary import times
from schedule_finder.errors import InputError
from schedule_finder.provenance import provenance
from schedule_finder.shapes import RANDOM_WEIGHTS, is_shape
from schedule_finder.synthetic_inputs import DEFAULT_TEXT_TOKENS, synthetic_inputs

FORMAT, VERSION = "adaptinfer-bench", 1
LENGTHS = (1, 16, 128)
MIN_ROUNDS, MAX_ROUNDS, DECODE_ROUNDS = 3, 15, 3


def run_benchmark(
    backbone: Backbone,
    schedule: Schedule,
    *,
    schedule_source: str = "",
    batches: Sequence[int] = (1,),
    lengths: Sequence[int] = LENGTHS,
    num_vision: int | None = None,
    num_text: int = DEFAULT_TEXT_TOKENS,
    rounds: int = MAX_ROUNDS,
    seconds: float = 90.0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[str, Any]:
    """Measure ours and its competitors; the result is a JSON-able document.

    The first rounds generate as many tokens as the longest of ``lengths``; the others only prefill, which is where
    the differences are, until ``rounds`` or ``seconds`` are over.

    Args:
        backbone: on the device and in the precision that count.
        schedule: made for this backbone.
        schedule_source: one line for the report.
        batches: batch sizes.
        lengths: numbers of new tokens to report totals for.
        num_vision, num_text: tokens of each prompt, as in `synthetic_inputs`.
        rounds: at most so many per batch size, and at least three.
        seconds: for all batch sizes together; the first three rounds are run however long they take.
        progress: called with batch sizes done and their number.

    Raises:
        InputError: inputs that this backbone cannot take.
    """
    lengths = sorted(set(lengths))
    if not lengths or lengths[0] < 1 or not batches or min(batches) < 1:
        raise InputError("--lengths and --batch: whole numbers from 1 on")
    parameter = next(backbone.model.parameters())
    results, rates = [], []
    for done, batch in enumerate(batches):
        progress(done, len(batches))
        bench = Bench(backbone, synthetic_inputs(backbone, batch, num_vision, num_text))
        until = time.monotonic() + seconds / len(batches)
        rate, found = _measure(bench, schedule, batch, lengths, rounds, until)
        rates.append({"batch": batch, **asdict(rate)})
        results += found
    progress(len(batches), len(batches))
    shape_only = is_shape(backbone.name)
    return {
        "format": FORMAT,
        "version": VERSION,
        "note": RANDOM_WEIGHTS if shape_only else None,
        "backbone": {
            "name": backbone.name,
            "model_type": backbone.model_type,
            "parameters": sum(weights.numel() for weights in backbone.model.parameters()),
            "weight_bytes": sum(weights.nbytes for weights in backbone.model.parameters()),
            "attention": backbone.text_model.config._attn_implementation,
            **asdict(backbone.shape),
        },
        "prompt": {"vision_tokens": bench.num_vision, "text_tokens": num_text},
        "schedule": {
            "source": schedule_source,
            "stages": [[stage.layer, stage.kept(bench.num_vision)] for stage in schedule.stages],
            "scorer": schedule.scorer.name,
            "positions": schedule.positions,
        },
        "lengths": lengths,
        "competitors": {one.name: one.what for one in competitors(schedule, bench.num_vision)},
        "rates": rates,
        "results": results,
        "environment": provenance(
            device=str(parameter.device),
            device_name=torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else None,
            cuda=torch.version.cuda,
            dtype=str(parameter.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
        ),
    }


def _measure(
    bench: Bench, schedule: Schedule, batch: int, lengths: Sequence[int], rounds: int, until: float
) -> tuple[Rates, list[dict[str, Any]]]:
    """All competitors on one batch."""
    every = competitors(schedule, bench.num_vision)
    backbone = bench.backbone
    parameter = next(backbone.model.parameters())
    # Also warms up prefill and decoding.
    peaks = {one.name: peak_bytes(functools.partial(bench.run, one, 2), bench.device) for one in every}
    runs: dict[str, list[Run]] = {one.name: [] for one in every}
    rates = []
    for number in range(max(rounds, MIN_ROUNDS)):
        if number >= MIN_ROUNDS and time.monotonic() > until:
            break
        rows = batch * bench.inputs["input_ids"].shape[1]
        rates.append(measure_rates(backbone.shape, rows, parameter.device, parameter.dtype))
        length = lengths[-1] if number < DECODE_ROUNDS else 1
        turn = number % len(every)
        for one in every[turn:] + every[:turn]:
            runs[one.name].append(bench.run(one, length))
    rate = Rates(
        *(statistics.median(values) for values in zip(*((r.flops, r.bytes) for r in rates), strict=True))
    )
    full = runs["unpruned"]
    full_flops = prefill_flops(backbone.shape, full[0].tokens_per_layer)
    results = []
    for one in every:
        own = runs[one.name]
        tokens = own[0].tokens_per_layer
        results.append(
            {
                "batch": batch,
                "competitor": one.name,
                "processed": (sum(tokens) / len(tokens) - full[0].tokens_per_layer[0]) / bench.num_vision + 1,
                "tokens_per_layer": tokens,
                "flops_ratio": prefill_flops(backbone.shape, tokens) / full_flops,
                "roofline_ms": roofline_ms(backbone.shape, tokens, batch, rate, parameter.element_size()),
                "cache_bytes": own[0].cache_bytes,
                "peak_bytes": peaks[one.name],
                **times(own, full, lengths),
            }
        )
    return rate, results
