"""What a run will do: samples, forward passes, generated answers, and time and memory from a few timed batches."""

from __future__ import annotations

import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from schedule_finder.errors import BadSample, InputError
from schedule_finder.measuring.own_answers import greedy_answers, with_answers
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.profiling.capture import profile_batch
from schedule_finder.profiling.engines.base import BatchLimits
from schedule_finder.samples import DataSet, Sample, SampleEntry
from schedule_finder.search import measured_layers
from schedule_finder.search_work import search_answers, search_forwards

TIMED_BATCHES = 2


@dataclass(frozen=True)
class Timing:
    """Seconds per sample, and what was timed.

    ``forward``: a pass over a prompt and its answer; ``answer``, ``own_answer``: generating an answer of the evaluation
    and of the search.
    """

    profile: float
    forward: float
    answer: float
    own_answer: float
    samples: int
    batches: int
    vision_tokens: tuple[int, ...]
    other_tokens: tuple[int, ...]


def plan_run(
    loaded: LoadedBackbone,
    data: DataSet,
    entries: Sequence[SampleEntry],
    limits: BatchLimits,
    *,
    solver: str,
    budget: float | None,
    methods: int,
    max_new_tokens: int,
    answer_tokens: int,
) -> dict[str, Any]:
    """Time a few batches and add up the work of a run; nothing is written.

    Args:
        loaded: the backbone.
        data: what samples are loaded from.
        entries: the run's list of samples; calibration samples that are ``done`` are not counted again.
        limits: of a batch.
        solver: of the search.
        budget: in vision tokens processed; None where it has another unit.
        methods: what is evaluated, the full model included; 0: nothing.
        max_new_tokens: longest answer of the evaluation.
        answer_tokens: longest answer of the search.

    Returns:
        A JSON-able document: ``samples``, ``tokens_per_sample``, ``forwards``, ``search_answers``, ``generations``,
        ``seconds``, ``memory`` and ``timed``. Forward passes are counted per sample; those of the search in unpruned ones.
    """
    calibration = [one for one in entries if one.use == "calibration"]
    pending = [one for one in calibration if one.status == "pending"]
    held_out = sum(one.use == "held_out" and one.status != "skipped" for one in entries) if methods else 0
    timing = _time_batches(loaded, data, calibration, limits, max_new_tokens, answer_tokens)
    search = _search(loaded, timing, solver, budget, len(calibration), answer_tokens)
    answers = search_answers(solver, len(calibration), answer_tokens)
    forwards = {"profile": len(pending), "search": None if search is None else round(search)}
    generations = held_out * methods
    seconds = {
        "profile": len(pending) * timing.profile,
        "search": None if search is None else search * timing.forward + answers * timing.own_answer,
        "evaluate": generations * timing.answer,
    }
    return {
        "samples": {"calibration": len(calibration), "profile": len(pending), "held_out": held_out},
        "tokens_per_sample": {
            name: {"mean": round(statistics.mean(counts), 1), "min": min(counts), "max": max(counts)}
            for name, counts in (("vision", timing.vision_tokens), ("other", timing.other_tokens))
        },
        "forwards": forwards,
        "search_answers": answers,
        "methods": methods,
        "generations": generations,
        "seconds": {name: None if value is None else round(value, 2) for name, value in seconds.items()},
        "memory": _memory(loaded),
        "timed": {"samples": timing.samples, "batches": timing.batches},
    }


def _search(
    loaded: LoadedBackbone,
    timing: Timing,
    solver: str,
    budget: float | None,
    samples: int,
    answer_tokens: int,
) -> float | None:
    """Unpruned forward passes of one sample that the search needs; None where that is not known before."""
    vision = sum(timing.vision_tokens)
    other = sum(timing.other_tokens) + (answer_tokens - 1) * timing.samples
    return search_forwards(
        solver,
        measured_layers(loaded.backbone),
        loaded.backbone.shape.num_layers,
        samples,
        vision_share=vision / (vision + other),
        budget=budget,
    )


def _time_batches(
    loaded: LoadedBackbone,
    data: DataSet,
    entries: Sequence[SampleEntry],
    limits: BatchLimits,
    max_new_tokens: int,
    answer_tokens: int,
) -> Timing:
    samples = _usable(data, entries, TIMED_BATCHES * limits.samples)
    first = _on_device(loaded, samples[:1])
    _seconds(loaded, lambda: profile_batch(loaded.backbone, first, limits.text_queries))  # warm-up
    size = max(1, min(limits.samples, limits.tokens_on(loaded.device) // first["input_ids"].shape[1]))
    batches = [
        samples[start : start + size] for start in range(0, min(len(samples), TIMED_BATCHES * size), size)
    ]
    vision: list[int] = []
    other: list[int] = []
    seconds = 0.0
    for batch in batches:
        inputs = _on_device(loaded, batch)
        profile = functools.partial(profile_batch, loaded.backbone, inputs, limits.text_queries)
        seconds += _seconds(loaded, profile)
        mask = loaded.backbone.vision_mask(inputs["input_ids"])
        valid = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum(1)
        vision += mask.sum(1).tolist()
        other += (valid - mask.sum(1)).tolist()
    inputs, count = _on_device(loaded, batches[0]), len(batches[0])
    return Timing(
        profile=seconds / len(vision),
        forward=_seconds(loaded, lambda: _forward(loaded, inputs, answer_tokens)) / count,
        answer=_seconds(loaded, lambda: loaded.generate(inputs, max_new_tokens)) / count,
        own_answer=_seconds(loaded, lambda: greedy_answers(loaded.backbone, inputs, answer_tokens)) / count,
        samples=len(vision),
        batches=len(batches),
        vision_tokens=tuple(vision),
        other_tokens=tuple(other),
    )


def _usable(data: DataSet, entries: Sequence[SampleEntry], count: int) -> list[Sample]:
    """The first ``count`` samples that can be loaded. Raises `InputError` where there is none."""
    found: list[Sample] = []
    reason = "there is none"
    for entry in entries:
        if len(found) == count:
            break
        try:
            found.append(data.load(entry))
        except BadSample as error:
            reason = str(error)
    if not found:
        raise InputError(f"--dry-run: no calibration sample can be used; the last: {reason}")
    return found


def _on_device(loaded: LoadedBackbone, samples: list[Sample]) -> dict[str, Any]:
    return {name: value.to(loaded.device) for name, value in loaded.inputs(samples).items()}


def _forward(loaded: LoadedBackbone, inputs: dict[str, Any], answer_tokens: int) -> None:
    """One pass over prompts and the longest answers."""
    model: Any = loaded.backbone.model
    longest = inputs["input_ids"][:, -1:].repeat(1, answer_tokens).tolist()
    with torch.inference_mode():
        whole = with_answers(loaded.backbone, inputs, longest)
        model(**whole, use_cache=False, logits_to_keep=answer_tokens)


def _seconds(loaded: LoadedBackbone, work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    if loaded.device.type == "cuda":
        torch.cuda.synchronize(loaded.device)
    return time.perf_counter() - begun


def _memory(loaded: LoadedBackbone) -> dict[str, Any]:
    """Bytes of the weights, and the peak so far: of the GPU, or of this process."""
    weights = sum(one.numel() * one.element_size() for one in loaded.backbone.model.parameters())
    if loaded.device.type == "cuda":
        peak, where = torch.cuda.max_memory_allocated(loaded.device), "gpu"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak, where = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"
    return {"weights_bytes": weights, "peak_bytes": peak, "peak_of": where}
