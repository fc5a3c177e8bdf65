"""Latency and memory by part, ours and its competitors in the same run.

Every competitor gets the same inputs, in rounds whose order rotates, so that a machine that slows down slows all
alike. What is timed is `generate` with a fixed number of new tokens: its first forward is the prefill, the others
are decoding. Each moment in between belongs to exactly one part, so the parts of a run add up to its total.

Needs torch, transformers and the runtime only: it also runs where the finder's other packages are not installed.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pruning_runtime import Record, Schedule, ScheduleError, Stage, pruned
from pruning_runtime.accounting import prefill_flops
from pruning_runtime.backbone import Backbone, DecoderShape
from pruning_runtime.schedule import BackboneIdentity, ScorerChoice
from schedule_finder.errors import InputError
from schedule_finder.files import write_text
from schedule_finder.provenance import provenance
from schedule_finder.shapes import RANDOM_WEIGHTS, is_shape
from schedule_finder.synthetic_inputs import DEFAULT_TEXT_TOKENS, synthetic_inputs

FORMAT, VERSION = "adaptinfer-bench", 1
DEFAULT_PRESET = "adaptinfer/llava-1.5-7b-64"
LENGTHS = (1, 16, 128)
PREFILL_PARTS = ("vision_tower", "projector", "decoder", "scoring", "dropping", "lm_head", "other")
DECODE_PARTS = ("decoder", "lm_head", "other")
MIN_ROUNDS, MAX_ROUNDS, DECODE_ROUNDS = 3, 15, 3
_MATMULS, _COPY_BYTES = 4, {"cuda": 2**29, "cpu": 2**26}


# ---- competitors


@dataclass(frozen=True)
class Competitor:
    """One way to run the same prompt; ``schedule`` None: the model as it is."""

    name: str
    what: str
    schedule: Schedule | None = None
    eager_stages: bool = False


def competitors(schedule: Schedule, num_vision: int) -> list[Competitor]:
    """Ours and what it is held against; those at the same cost keep as many tokens as whole tokens allow.

    Args:
        schedule: ours.
        num_vision: vision tokens of the prompt.
    """
    layers = schedule.backbone.num_layers
    processed = sum(_kept(schedule.stages, num_vision, layers)) / (layers * num_vision)
    strided = ScorerChoice(name="strided")
    found = [
        Competitor("unpruned", "the model as it is, outside `pruned`"),
        Competitor("schedule", f"the schedule, scorer {schedule.scorer.name}", schedule),
        Competitor(
            "oracle",
            "same stages and kept counts, evenly strided tokens: no attention is read, selection and gathering are ours",
            schedule.model_copy(update={"scorer": strided}),
        ),
        Competitor(
            "eager, syncs",
            "same stages and kept counts; stage layers run eager attention and return whole maps, which are scored row "
            "by row, read to the host and made into lists of positions there; the tokens that leave are strided ones",
            schedule.model_copy(update={"scorer": strided}),
            eager_stages=True,
        ),
    ]
    last = min(1, layers - 2)
    for layer in range(last, -1, -1):
        ratio = (processed * layers - (layer + 1)) / (layers - layer - 1)
        if ratio >= 0:
            stages = (Stage(layer=layer, keep_ratio=ratio),)
            what = f"FastV's rule: the last token's attention, one stage after layer {layer}, as many tokens processed"
            fastv = {"stages": stages, "scorer": ScorerChoice(name="last_token")}
            found.append(Competitor("FastV-like", what, schedule.model_copy(update=fastv)))
            break
    before = {"stages": (Stage(layer=-1, keep_ratio=processed),), "scorer": strided}
    what = "strided tokens dropped before the decoder, as many tokens processed"
    found.append(Competitor("before decoder", what, schedule.model_copy(update=before)))
    return found


def _kept(stages: Sequence[Stage], num_vision: int, num_layers: int) -> list[int]:
    """Vision tokens that each layer computes."""
    counts = []
    for layer in range(num_layers):
        done = [stage.kept(num_vision) for stage in stages if stage.layer < layer]
        counts.append(done[-1] if done else num_vision)
    return counts


def choose_schedule(name: str | None, backbone: Backbone) -> tuple[Schedule, str]:
    """A schedule for this backbone, and one line on where it comes from.

    A preset made for another depth or family is moved: its layers to the same fractions of the depth, its ratios as
    they are. So is any schedule on a ``shape:`` backbone, whose attention means nothing anyway.

    Args:
        name: a schedule file or a preset; None: the published preset that fits, or else AdaptInfer's for LLaVA-1.5-7B.
        backbone: to be measured.

    Raises:
        ScheduleError: no such file or preset, or a file made for another backbone.
    """
    presets = Schedule.presets()
    if name is None:
        ours = [preset for preset in presets if preset.startswith("adaptinfer/")]
        fitting = [preset for preset in ours if _fits(Schedule.preset(preset), backbone)]
        name = min(fitting, key=lambda preset: (not preset.endswith("-64"), preset), default=DEFAULT_PRESET)
    is_preset = name in presets and not Path(name).exists()
    schedule = Schedule.preset(name) if is_preset else Schedule.load(name)
    if _fits(schedule, backbone):
        return schedule, name
    if not (is_preset or is_shape(backbone.name)):
        schedule.check_backbone(backbone)
    made_for = f"{schedule.backbone.name}, {schedule.backbone.num_layers} layers"
    return _moved(
        schedule, backbone
    ), f"{name} (made for {made_for}; moved to the same fractions of the depth)"


def _fits(schedule: Schedule, backbone: Backbone) -> bool:
    try:
        schedule.check_backbone(backbone)
    except ScheduleError:
        return False
    return True


def _moved(schedule: Schedule, backbone: Backbone) -> Schedule:
    depth = backbone.shape.num_layers
    stages: dict[int, Stage] = {}
    for stage in schedule.stages:
        layer = stage.layer
        if layer >= 0:
            layer = min(round(layer * depth / schedule.backbone.num_layers), depth - 2)
        stages[layer] = Stage(layer=layer, keep_ratio=stage.keep_ratio)  # of two that meet, the later holds
    identity = BackboneIdentity(name=backbone.name, model_type=backbone.model_type, num_layers=depth)
    return Schedule(
        backbone=identity,
        stages=tuple(stages.values()),
        scorer=schedule.scorer,
        positions=schedule.positions,
        separators=schedule.separators,
        residual=schedule.residual,
    )


# ---- time


class PartClock:
    """Divides a run into parts: every moment from `start` to `stop` belongs to exactly one of them.

    Parts nest; while an inner one is open, the outer one's time stands still. Moments are only taken while running
    and read afterwards, so that measuring does not wait for a device.

    Args:
        now: takes a moment.
        between: milliseconds from one moment to a later one.
    """

    def __init__(self, now: Callable[[], Any], between: Callable[[Any, Any], float]) -> None:
        self._now, self._between = now, between
        self._moments: list[tuple[Any, tuple[str, str]]] = []
        self._open: list[str] = []
        self._forwards: list[int] = []
        self._phase = ""
        self.running = False

    @classmethod
    def on(cls, device: torch.device) -> PartClock:
        """A clock for a device: events on CUDA, `time.perf_counter` elsewhere."""
        if device.type != "cuda":
            return cls(time.perf_counter, lambda begun, ended: 1e3 * (ended - begun))

        def event() -> Any:
            made = torch.cuda.Event(enable_timing=True)
            made.record(torch.cuda.current_stream(device))
            return made

        return cls(event, lambda begun, ended: begun.elapsed_time(ended))

    def start(self) -> None:
        """Begin with the prefill, in the part ``other``."""
        self._moments, self._forwards = [], []
        self._open, self._phase, self.running = ["other"], "prefill", True
        self._mark()

    def enter(self, part: str) -> None:
        """Open a part; nothing happens while the clock does not run."""
        if self.running:
            self._open.append(part)
            self._mark()

    def leave(self) -> None:
        """Close the part opened last."""
        if self.running:
            self._open.pop()
            self._mark()

    def end_forward(self, last: bool) -> None:
        """A token's logits are there: the next is decoding; after the last the clock stops."""
        if self.running:
            self._phase = "decode"
            self._mark()
            self._forwards.append(len(self._moments) - 1)
            self.running = not last

    def read(self) -> tuple[dict[str, dict[str, float]], list[float]]:
        """Milliseconds by phase (``prefill``, ``decode``) and part, and from the start to each token."""
        parts: dict[str, dict[str, float]] = {"prefill": defaultdict(float), "decode": defaultdict(float)}
        elapsed, since_start = [0.0], 0.0
        for (begun, (phase, part)), (ended, _) in zip(self._moments, self._moments[1:], strict=False):
            passed = self._between(begun, ended)
            parts[phase][part] += passed
            since_start += passed
            elapsed.append(since_start)
        return {phase: dict(found) for phase, found in parts.items()}, [elapsed[at] for at in self._forwards]

    def _mark(self) -> None:
        self._moments.append((self._now(), (self._phase, self._open[-1])))


def _parts_of(backbone: Backbone) -> dict[str, list[nn.Module]]:
    """Modules by part. Raises `InputError` where the vision tower is not where stock families have it."""
    model: Any = backbone.model
    inner = model.model
    tower = getattr(inner, "vision_tower", None) or getattr(inner, "visual", None)
    if tower is None:
        raise InputError(f"{type(model).__name__}: no `vision_tower` or `visual` to time")
    names = ("multi_modal_projector", "merger", "deepstack_merger_list")
    projectors = [getattr(owner, name) for owner in (inner, tower) for name in names if hasattr(owner, name)]
    called = [
        module for found in projectors for module in (found if isinstance(found, nn.ModuleList) else [found])
    ]
    return {
        "vision_tower": [tower],
        "projector": called,
        "decoder": [backbone.text_model],
        "lm_head": [model.get_output_embeddings()],
    }


@contextmanager
def _timed(backbone: Backbone, clock: PartClock, length: int, caches: list[int]) -> Iterator[None]:
    """Run the clock by hooks for ``length`` forwards; what the prompt's cache holds, in bytes, goes to ``caches``."""
    count = 0

    def end_forward(_module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal count
        if not clock.running:
            return
        count += 1
        clock.end_forward(last=count == length)
        if count == 1:
            caches.append(Record(0, cache=output.past_key_values).cache_bytes)

    with ExitStack() as undo:
        for part, modules in _parts_of(backbone).items():
            for module in modules:
                enter = module.register_forward_pre_hook(lambda *_, part=part: clock.enter(part))
                undo.callback(enter.remove)
                undo.callback(module.register_forward_hook(lambda *_: clock.leave()).remove)
        undo.callback(backbone.model.register_forward_hook(end_forward).remove)
        yield


# ---- eager recompute with host syncs


@contextmanager
def _eager_stages(
    backbone: Backbone, schedule: Schedule, num_vision: int, first: int, clock: PartClock
) -> Iterator[None]:
    """Stage layers run eager attention over whole maps, which are scored row by row on the way to the host.

    The text-guided rule; prompts are laid out as `synthetic_inputs` does: text, vision from ``first`` on, text.
    """
    kept_before = _kept(schedule.stages, num_vision, schedule.backbone.num_layers)
    with ExitStack() as undo:
        for stage in schedule.stages:
            if stage.layer < 0:
                continue
            attention: Any = backbone.layers[stage.layer].self_attn
            undo.callback(setattr, attention, "config", attention.config)
            attention.config = copy.deepcopy(attention.config)
            attention.config._attn_implementation = "eager"
            score = _host_scoring(first, kept_before[stage.layer], stage.kept(num_vision), clock)
            undo.callback(attention.register_forward_pre_hook(_with_causal_mask, with_kwargs=True).remove)
            undo.callback(attention.register_forward_hook(score).remove)
        yield


def _with_causal_mask(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Eager attention is causal by its mask alone."""
    hidden = kwargs["hidden_states"]
    length = hidden.shape[1]
    if length == 1:
        return None
    lowest = torch.finfo(hidden.dtype).min
    mask = torch.full((length, length), lowest, dtype=hidden.dtype, device=hidden.device).triu(1)
    return args, {**kwargs, "attention_mask": mask[None, None]}


def _host_scoring(first: int, num_vision: int, keep: int, clock: PartClock) -> Callable[..., None]:
    def score(_module: nn.Module, _args: Any, output: Any) -> None:
        maps: Tensor = output[1]
        length = maps.shape[-1]
        if maps.shape[-2] == 1:
            return  # decoding
        clock.enter("scoring")
        vision, text = slice(first, first + num_vision), slice(first + num_vision, length)
        for row in maps:
            among = row[:, text, text]
            weights = among.sum(1) + among.sum(2) - among.diagonal(dim1=1, dim2=2)
            scores = (weights[..., None] * row[:, text, vision]).sum((0, 1))
            kept = sorted(scores.topk(keep).indices.tolist())
            places = [*range(first), *(first + place for place in kept), *range(first + num_vision, length)]
            torch.tensor(places, device=maps.device)
        clock.leave()

    return score


# ---- one run


@dataclass(frozen=True)
class _Run:
    """What one `generate` gave."""

    parts: dict[str, dict[str, float]]
    token_ms: list[float]
    """Milliseconds from the start to each new token's logits."""
    cache_bytes: int
    tokens_per_layer: list[int]
    """Of one row, all kinds."""


class _Bench:
    """One batch of one backbone; runs any competitor on it."""

    def __init__(self, backbone: Backbone, inputs: dict[str, Tensor]) -> None:
        self.backbone, self.inputs = backbone, inputs
        self.device = next(backbone.model.parameters()).device
        is_vision = backbone.vision_mask(inputs["input_ids"])[0]
        self.num_vision = int(is_vision.sum())
        self.first = int(is_vision.int().argmax())
        self._clock = PartClock.on(self.device)

    def run(self, competitor: Competitor, length: int) -> _Run:
        """Generate ``length`` tokens, timed."""
        model: Any = self.backbone.model
        clock = self._clock
        caches: list[int] = []
        record: Record | None = None
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(_timed(self.backbone, clock, length, caches))
            if (schedule := competitor.schedule) is not None:
                record = stack.enter_context(pruned(model, schedule, timing=True))
                if competitor.eager_stages:
                    stack.enter_context(
                        _eager_stages(self.backbone, schedule, self.num_vision, self.first, clock)
                    )
            self._wait()
            clock.start()
            model.generate(
                **self.inputs, max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0
            )
            self._wait()
        parts, token_ms = clock.read()
        if record is None:
            tokens = [self.inputs["input_ids"].shape[1]] * self.backbone.shape.num_layers
        else:
            tokens = [rows[0] for rows in record.tokens_per_layer]
            for part in ("scoring", "dropping"):  # both happen inside the decoder
                spent = record.milliseconds.get(part, 0.0)
                parts["prefill"]["decoder"] -= spent
                parts["prefill"][part] = parts["prefill"].get(part, 0.0) + spent
        return _Run(parts, token_ms, caches[0], tokens)

    def peak_bytes(self, competitor: Competitor) -> int:
        """Most bytes allocated above what was there before, in a prefill and one decoding step."""
        if self.device.type == "cuda":
            self._wait()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.run(competitor, 2)
            return torch.cuda.max_memory_allocated(self.device) - before
        with _LiveBytes() as live:
            self.run(competitor, 2)
        return live.peak

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _LiveBytes(TorchDispatchMode):
    """Bytes of the tensors alive that operations made inside; what a kernel takes for itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._seen: WeakSet[torch.UntypedStorage] = WeakSet()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                size = storage.nbytes()
                finalize(storage, self._gone, size)
                self._now += size
                self.peak = max(self.peak, self._now)
        return made

    def _gone(self, size: int) -> None:
        self._now -= size


# ---- what the arithmetic allows


@dataclass(frozen=True)
class Rates:
    """What the device did in this run: floating-point operations and copied bytes (read and written), per second."""

    flops: float
    bytes: float


def measure_rates(shape: DecoderShape, rows: int, device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of one matrix product of the decoder's MLP over ``rows`` tokens, and of one large copy."""
    left = torch.randn(rows, shape.hidden_size, device=device, dtype=dtype)
    right = torch.randn(shape.hidden_size, shape.intermediate_size, device=device, dtype=dtype)
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.inference_mode():
        product = _best_ms(lambda: left @ right, device)
        copying = _best_ms(lambda: target.copy_(source), device)
    return Rates(
        flops=2 * rows * shape.hidden_size * shape.intermediate_size / product * 1e3,
        bytes=2 * source.nbytes / copying * 1e3,
    )


def _best_ms(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_MATMULS + 1):
        clock = PartClock.on(device)
        clock.start()
        call()
        clock.end_forward(last=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock.read()[1][0])
    return min(times[1:])


def roofline_ms(
    shape: DecoderShape, tokens_per_layer: Sequence[int], batch: int, rates: Rates, value_bytes: int
) -> float:
    """Milliseconds that the decoder's layers take at least over one batch of prompts.

    Per layer the longer of its floating-point operations at the measured rate, and its least traffic: weights once,
    hidden states read and written once, keys and values written once.
    """
    head = shape.head_dim + (shape.value_dim or shape.head_dim)
    weights = shape.hidden_size * (
        (shape.num_heads + shape.num_kv_heads) * head + 3 * shape.intermediate_size
    )
    per_token = 2 * shape.hidden_size + shape.num_kv_heads * head
    return 1e3 * sum(
        max(
            batch * prefill_flops(shape, [tokens]) / rates.flops,
            value_bytes * (weights + batch * tokens * per_token) / rates.bytes,
        )
        for tokens in tokens_per_layer
    )


# ---- the whole bench


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
        bench = _Bench(backbone, synthetic_inputs(backbone, batch, num_vision, num_text))
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
    bench: _Bench, schedule: Schedule, batch: int, lengths: Sequence[int], rounds: int, until: float
) -> tuple[Rates, list[dict[str, Any]]]:
    """All competitors on one batch."""
    every = competitors(schedule, bench.num_vision)
    backbone = bench.backbone
    parameter = next(backbone.model.parameters())
    peaks = {one.name: bench.peak_bytes(one) for one in every}  # also warms up prefill and decoding
    runs: dict[str, list[_Run]] = {one.name: [] for one in every}
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
                **_times(own, full, lengths),
            }
        )
    return rate, results


def _times(own: list[_Run], full: list[_Run], lengths: Sequence[int]) -> dict[str, Any]:
    """Medians and quartiles over rounds, ratios to the unpruned model round by round, and the rounds themselves."""
    decoded = [run for run in own if len(run.token_ms) > 1]
    per_token = [(run.token_ms[-1] - run.token_ms[0]) / (len(run.token_ms) - 1) for run in decoded]
    full_per_token = [
        (run.token_ms[-1] - run.token_ms[0]) / (len(run.token_ms) - 1)
        for run in full
        if len(run.token_ms) > 1
    ]
    gain = statistics.median(b.token_ms[0] - a.token_ms[0] for a, b in zip(own, full, strict=True))
    slower = [a - b for a, b in zip(per_token, full_per_token, strict=True)]
    # Where rounds do not even agree on which decodes faster, they are level: noise makes no break-even.
    level = not slower or min(slower) <= 0 <= max(slower)
    loss = 0.0 if level else statistics.median(slower)
    return {
        "decoder_ms": _spread([_decoder_ms(run) for run in own]),
        "decoder_ratio": _spread([_decoder_ms(a) / _decoder_ms(b) for a, b in zip(own, full, strict=True)]),
        "first_token_ms": _spread([run.token_ms[0] for run in own]),
        "token_ms": _spread(per_token) if decoded else None,
        "total_ms": {
            str(length): _spread([run.token_ms[length - 1] for run in own if len(run.token_ms) >= length])
            for length in lengths
        },
        "faster": None if own is full or not decoded else break_even(gain, loss),
        "prefill": {
            part: _spread([run.parts["prefill"].get(part, 0.0) for run in own]) for part in PREFILL_PARTS
        },
        "decode": {
            part: _spread([run.parts["decode"].get(part, 0.0) for run in decoded]) for part in DECODE_PARTS
        }
        if decoded
        else None,
        "rounds": [
            {"parts": run.parts, "total_ms": run.token_ms[-1], "new_tokens": len(run.token_ms)} for run in own
        ],
    }


def _decoder_ms(run: _Run) -> float:
    """The decoder's layers over the prompt, with all that a stage adds."""
    return sum(run.parts["prefill"].get(part, 0.0) for part in ("decoder", "scoring", "dropping"))


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    ordered = sorted(values)
    if len(ordered) == 1:
        return {"median": ordered[0], "q1": ordered[0], "q3": ordered[0]}
    first, middle, third = statistics.quantiles(ordered, n=4, method="inclusive")
    return {"median": middle, "q1": first, "q3": third}


def break_even(gain_ms: float, loss_ms: float) -> dict[str, Any]:
    """For which numbers of new tokens one way is faster than another.

    Args:
        gain_ms: milliseconds by which its first token comes earlier; negative where later.
        loss_ms: milliseconds by which each further token takes longer; negative where less.

    Returns:
        ``{"when": "always" | "never"}``, or ``{"when": "to" | "from", "tokens": n}``.
    """
    if gain_ms > 0 and loss_ms <= 0:
        return {"when": "always"}
    if gain_ms <= 0 and loss_ms >= 0:
        return {"when": "never"}
    even = gain_ms / loss_ms  # further tokens after which both are level
    if gain_ms > 0:
        return {"when": "to", "tokens": math.ceil(even)}
    return {"when": "from", "tokens": math.floor(even) + 2}


# ---- what is written and shown


def table(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row per batch size and competitor: medians, and quartiles as ``..._q1`` and ``..._q3``."""
    return [_flat(result) for result in document["results"]]


def _flat(result: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in result.items():
        name = f"{prefix}{key}"
        if key == "faster":
            row[name] = faster_text(value)
        elif isinstance(value, dict) and "median" in value:
            row |= {name: value["median"], f"{name}_q1": value["q1"], f"{name}_q3": value["q3"]}
        elif isinstance(value, dict):
            row |= _flat(value, f"{name}_")
        elif not isinstance(value, list):
            row[name] = value
    return row


def faster_text(faster: dict[str, Any] | None) -> str:
    """What `break_even` found, in words: for how many new tokens."""
    if faster is None:
        return ""
    return f"{faster['when']} {faster['tokens']}" if "tokens" in faster else str(faster["when"])


def write_benchmark(document: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``bench.json`` (everything, every round) and ``bench.csv`` (`table`) into ``folder``."""
    rows, text = table(document), io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    paths = [folder / "bench.json", folder / "bench.csv"]
    write_text(paths[0], json.dumps(document, indent=1) + "\n")
    write_text(paths[1], text.getvalue())
    return paths
