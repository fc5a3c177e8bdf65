"""One competitor's `generate` on one batch, timed by parts."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruning_runtime import Record, pruned
from pruning_runtime.backbone import Backbone
from schedule_finder.benchmark.clock import PartClock, timed_by_parts
from schedule_finder.benchmark.competitors import Competitor
from schedule_finder.benchmark.eager_stages import eager_stages


@dataclass(frozen=True)
class Run:
    """What one `generate` gave."""

    parts: dict[str, dict[str, float]]
    token_ms: list[float]
    """Milliseconds from the start to each new token's logits."""
    cache_bytes: int
    tokens_per_layer: list[int]
    """Of one row, all kinds."""


class Bench:
    """One batch of one backbone; runs any competitor on it."""

    def __init__(self, backbone: Backbone, inputs: dict[str, Tensor]) -> None:
        self.backbone, self.inputs = backbone, inputs
        self.device = next(backbone.model.parameters()).device
        is_vision = backbone.vision_mask(inputs["input_ids"])[0]
        self.num_vision = int(is_vision.sum())
        self.first = int(is_vision.int().argmax())
        self._clock = PartClock.on(self.device)

    def run(self, competitor: Competitor, length: int) -> Run:
        """Generate ``length`` tokens, timed."""
        model: Any = self.backbone.model
        clock = self._clock
        caches: list[int] = []
        record: Record | None = None
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(timed_by_parts(self.backbone, clock, length, caches))
            if (schedule := competitor.schedule) is not None:
                record = stack.enter_context(pruned(model, schedule, timing=True))
                if competitor.eager_stages:
                    stack.enter_context(
                        eager_stages(self.backbone, schedule, self.num_vision, self.first, clock)
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
        return Run(parts, token_ms, caches[0], tokens)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
