"""All baselines on the same inputs, in rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pruning_runtime import Schedule
from pruning_runtime.backbone import Backbone
from pruning_runtime.costs import prefill_flops
from schedule_finder.benchmark.baselines import SCHEDULE, UNPRUNED, Baseline, baselines
from schedule_finder.benchmark.memory import peak_bytes
from schedule_finder.benchmark.one_run import Bench, Run
from schedule_finder.benchmark.roofline import Rates, measure_rates, roofline_ms
from schedule_finder.benchmark.summary import times
from schedule_finder.errors import InputError
from schedule_finder.models.shapes import RANDOM_WEIGHTS, is_shape
from schedule_finder.models.synthetic_inputs import DEFAULT_TEXT_TOKENS, synthetic_inputs
from schedule_finder.provenance import provenance

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
    fast: bool | None = None,
    without: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    before_run: Callable[[str], None] = lambda _name: None,
) -> dict[str, Any]:
    """Measure a schedule and its baselines; the result can be written as JSON.

    The first three rounds (only the first one if time is up) generate as many tokens as the longest of ``lengths``, the
    others run the prefill only, until ``rounds`` or ``seconds`` are over.

    A baseline that fails is left out with its reason; errors of the unpruned model and of the schedule are raised.

    Args:
        backbone: on the device and in the precision to be measured.
        schedule, schedule_source: made for this backbone; one line about it for the report.
        batches, lengths: batch sizes; numbers of new tokens to report totals for.
        num_vision, num_text: tokens of each prompt, as in `synthetic_inputs`.
        rounds: maximum per batch size; at least three are run.
        seconds: time limit for all batch sizes together; three rounds are run in any case.
        fast: whether to measure the fast path as well; None: on a GPU only, where it captures graphs.
        without: names of baselines to leave out.
        progress, before_run: called with (rounds done, maximum), and with each baseline's name before it runs.

    Raises:
        InputError: the backbone cannot take such inputs.
    """
    lengths = _checked_lengths(lengths, batches)
    parameter = next(backbone.model.parameters())
    rounds = max(rounds, MIN_ROUNDS)
    fast = parameter.is_cuda if fast is None else fast
    document: dict[str, Any] = {"rates": [], "results": [], "failed": []}
    for index, batch in enumerate(batches):
        bench = Bench(backbone, synthetic_inputs(backbone, batch, num_vision, num_text))
        every = [one for one in baselines(schedule, bench.num_vision, fast=fast) if one.name not in without]

        def count(number: int, before: int = index * rounds) -> None:
            progress(before + number, len(batches) * rounds)

        until = time.monotonic() + seconds / len(batches)
        measured = _measure(bench, every, lengths[-1], rounds, until, count, before_run)
        _add_results(document, bench, every, measured, lengths)
    progress(len(batches) * rounds, len(batches) * rounds)
    return {
        **_description(backbone, schedule, bench.num_vision, num_text, schedule_source),
        "lengths": lengths,
        "baselines": {one.name: one.what for one in every},
        **document,
        "environment": _environment(parameter),
    }


def _checked_lengths(lengths: Sequence[int], batches: Sequence[int]) -> list[int]:
    found = sorted(set(lengths))
    if not found or found[0] < 1 or not batches or min(batches) < 1:
        raise InputError("--lengths and --batch: whole numbers of at least 1")
    return found


def _environment(parameter: torch.Tensor) -> dict[str, Any]:
    return provenance(
        device=str(parameter.device),
        device_name=torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else None,
        cuda=torch.version.cuda,
        dtype=str(parameter.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def _description(
    backbone: Backbone, schedule: Schedule, num_vision: int, num_text: int, source: str
) -> dict[str, Any]:
    """What was measured, as the document states it."""
    weights = list(backbone.model.parameters())
    return {
        "format": FORMAT,
        "version": VERSION,
        "note": RANDOM_WEIGHTS if is_shape(backbone.name) else None,
        "backbone": {
            "name": backbone.name,
            "model_type": backbone.model_type,
            "parameters": sum(weight.numel() for weight in weights),
            "weight_bytes": sum(weight.nbytes for weight in weights),
            "attention": backbone.text_model.config._attn_implementation,
            **asdict(backbone.shape),
        },
        "prompt": {"vision_tokens": num_vision, "text_tokens": num_text},
        "schedule": {
            "source": source,
            "stages": [[stage.layer, stage.kept(num_vision)] for stage in schedule.stages],
            "scorer": schedule.scorer.name,
            "positions": schedule.positions,
            "dropped_tokens": schedule.dropped_tokens,
        },
    }


@dataclass
class _Measured:
    """The rounds of one batch size."""

    rate: Rates
    peaks: dict[str, int]
    runs: dict[str, list[Run]]
    """By baseline, without those that failed."""
    failed: dict[str, str]


def _measure(
    bench: Bench,
    every: Sequence[Baseline],
    longest: int,
    rounds: int,
    until: float,
    progress: Callable[[int], None],
    before_run: Callable[[str], None],
) -> _Measured:
    """Measure all baselines on one batch: first their memory, then rounds until ``until``."""
    backbone, length = bench.backbone, 2
    parameter = next(backbone.model.parameters())
    rates: list[Rates] = []
    peaks: dict[str, int] = {}
    runs: dict[str, list[Run]] = {one.name: [] for one in every}
    failed: dict[str, str] = {}

    def note_peak(one: Baseline) -> None:
        peaks[one.name] = peak_bytes(lambda: bench.run(one, length), bench.device)

    def note_run(one: Baseline) -> None:
        runs[one.name].append(bench.run(one, length))

    def attempt(note: Callable[[Baseline], None], one: Baseline) -> None:
        if one.name in failed:
            return
        before_run(one.name)
        try:
            note(one)
            return
        except Exception as error:
            if one.name in (UNPRUNED, SCHEDULE):
                raise
            failed[one.name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        bench.recover()  # after the except block, so that no frame holds tensors of the failed run

    progress(0)
    if bench.device.type == "cuda":
        attempt(note_run, every[0])  # libraries allocate memory at their first call
        runs[every[0].name].clear()
    for one in every:
        attempt(note_peak, one)  # also warms up prefill and decoding
    for number in range(rounds):
        if number >= MIN_ROUNDS and time.monotonic() > until:
            break
        rows = bench.inputs["input_ids"].numel()
        rates.append(measure_rates(backbone.shape, rows, bench.device, parameter.dtype))
        decodes = number < DECODE_ROUNDS and (number == 0 or time.monotonic() < until)
        length = longest if decodes else 1
        turn = number % len(every)
        for one in (*every[turn:], *every[:turn]):
            attempt(note_run, one)
        progress(number + 1)
    rate = Rates(
        flops=statistics.median(rate.flops for rate in rates),
        bytes=statistics.median(rate.bytes for rate in rates),
    )
    runs = {name: found for name, found in runs.items() if name not in failed}
    return _Measured(rate, peaks, runs, failed)


def _add_results(
    document: dict[str, Any],
    bench: Bench,
    every: Sequence[Baseline],
    measured: _Measured,
    lengths: Sequence[int],
) -> None:
    """Add the rates, one row per baseline that did not fail, and the failures."""
    backbone, runs = bench.backbone, measured.runs
    batch, full_length = bench.inputs["input_ids"].shape
    full = runs[UNPRUNED]
    full_flops = prefill_flops(backbone.shape, full[0].tokens_per_layer)
    value_bytes = next(backbone.model.parameters()).element_size()
    document["rates"].append({"batch": batch, **asdict(measured.rate)})
    document["failed"] += [
        {"batch": batch, "baseline": name, "reason": why} for name, why in measured.failed.items()
    ]
    for one in every:
        if one.name not in runs:
            continue
        own = runs[one.name]
        tokens, pre_decoder_cost = own[0].tokens_per_layer, own[0].pre_decoder_cost
        document["results"].append(
            {
                "batch": batch,
                "baseline": one.name,
                "fast": one.fast,
                "processed": (sum(tokens) / len(tokens) - full_length) / bench.num_vision
                + 1
                + pre_decoder_cost / len(tokens),
                "tokens_per_layer": tokens,
                "flops_ratio": prefill_flops(
                    backbone.shape, tokens, pre_decoder_tokens=full_length if pre_decoder_cost else 0
                )
                / full_flops,
                "roofline_ms": roofline_ms(backbone.shape, tokens, batch, measured.rate, value_bytes),
                "cache_bytes": own[0].cache_bytes,
                "peak_bytes": measured.peaks[one.name],
                **times(own, full, runs.get(one.baseline), lengths),
            }
        )
