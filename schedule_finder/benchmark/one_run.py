"""One baseline's `generate` on one batch, timed by parts."""

from __future__ import annotations

import gc
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruning_runtime import Record, pruned
from pruning_runtime.backbone import Backbone
from schedule_finder.benchmark.baselines import Baseline
from schedule_finder.benchmark.clock import PRUNING_PARTS, PartClock, timed_by_parts
from schedule_finder.benchmark.eager_stages import eager_stages
from schedule_finder.models.generation import GREEDY


@dataclass(frozen=True)
class Run:
    """The measurements of one `generate`."""

    parts: dict[str, dict[str, float]]
    token_ms: list[float]
    """Milliseconds from the start to each new token's logits."""
    cache_bytes: int
    tokens_per_layer: list[int]
    """Of one row, tokens of all kinds."""
    undivided: bool = False
    """Whether scoring and dropping are inside ``decoder``: a captured graph cannot be divided."""
    pre_decoder_cost: float = 0.0
    """Cost of pre-decoder scoring, as a share of a layer."""


class Bench:
    """Runs baselines on one batch of one backbone."""

    def __init__(self, backbone: Backbone, inputs: dict[str, Tensor]) -> None:
        self.backbone, self.inputs = backbone, inputs
        self.device = next(backbone.model.parameters()).device
        is_vision = backbone.vision_mask(inputs["input_ids"])[0]
        self.num_vision = int(is_vision.sum())
        self.first = int(is_vision.int().argmax())

    def run(self, baseline: Baseline, length: int) -> Run:
        """Generate ``length`` tokens, timed; graphs of the fast path are captured before the clock starts."""
        clock = PartClock.on(self.device)
        caches: list[int] = []
        record: Record | None = None
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(timed_by_parts(self.backbone, clock, length, caches))
            if (schedule := baseline.schedule) is not None:
                if baseline.fast:
                    caught = stack.enter_context(warnings.catch_warnings(record=True, action="always"))
                # A captured graph cannot be divided into parts; otherwise the runtime times its own parts.
                record = stack.enter_context(
                    pruned(self.backbone.model, schedule, timing=not baseline.fast, fast=baseline.fast)
                )
                if baseline.eager_stages:
                    stack.enter_context(
                        eager_stages(self.backbone, schedule, self.num_vision, self.first, clock)
                    )
                if baseline.fast:
                    self._generate(1)
                    if record.fast_prefills < record.prefills:  # the plain path ran instead
                        raise RuntimeError("; ".join(str(one.message) for one in caught))
            self._wait()
            clock.start()
            self._generate(length)
            self._wait()
        if baseline.fast:
            gc.collect()  # the graphs and their memory are in reference cycles
        parts, token_ms = clock.read()
        if record is None:
            tokens = [self.inputs["input_ids"].shape[1]] * self.backbone.shape.num_layers
        else:
            tokens = [rows[0] for rows in record.tokens_per_layer]
            for part in PRUNING_PARTS:
                spent = record.milliseconds.get(part, 0.0)
                parts["prefill"]["decoder"] -= spent
                parts["prefill"][part] = parts["prefill"].get(part, 0.0) + spent
        pre_decoder_cost = 0.0 if record is None else record.pre_decoder_cost
        return Run(parts, token_ms, caches[0], tokens, baseline.fast, pre_decoder_cost)

    def recover(self) -> None:
        """Free the memory of a failed run. Raises if the device does not respond any more."""
        gc.collect()
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _generate(self, length: int) -> None:
        model: Any = self.backbone.model
        model.generate(**self.inputs, max_new_tokens=length, min_new_tokens=length, pad_token_id=0, **GREEDY)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
