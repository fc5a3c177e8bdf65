"""What a decoder's prefill takes on this device, from few measurements: milliseconds per layer by tokens."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pruning_runtime import Schedule
from pruning_runtime.schedule import ScorerChoice, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from schedule_finder.models.loading import LoadedBackbone

MEASURED_RATIOS = (1.0, 0.75, 0.5, 0.3, 0.15, 0.05, 0.0)
ROUNDS = 7


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds of one decoder layer as a function of its tokens, and of one stage.

    ``tokens`` rise; between them the time is linear, beyond them it goes on in proportion. Times are for one
    prompt of a batch of ``batch_size``.
    """

    tokens: tuple[float, ...]
    layer_ms: tuple[float, ...]
    stage_ms: float
    batch_size: int
    device: str

    def prefill_ms(self, tokens_per_layer: Sequence[float], num_stages: int) -> float:
        """Milliseconds of the decoder's layers and its stages for one prompt."""
        count = np.asarray(tokens_per_layer, dtype=float)
        known = np.interp(count, self.tokens, self.layer_ms)
        known = np.where(count > self.tokens[-1], self.layer_ms[-1] * count / self.tokens[-1], known)
        return float(known.sum() + num_stages * self.stage_ms)


def measure_latency(loaded: LoadedBackbone, inputs: dict[str, Tensor], scorer: str) -> LatencyModel:
    """Measure on one batch: the decoder with all layers at a few lengths, and what one stage adds.

    Medians over rounds that take all lengths in turn, so that a machine that slows down slows all alike.

    Args:
        loaded: the backbone on the device that counts.
        inputs: a batch, one prompt length throughout being the fairest.
        scorer: whose stages are timed.
    """
    import torch

    num_layers = loaded.backbone.shape.num_layers
    inputs = {name: value.to(loaded.device) for name, value in inputs.items()}
    before_all = [(_schedule(loaded, -1, ratio, "strided"), ratio) for ratio in MEASURED_RATIOS]
    middle = num_layers // 2 - 1
    staged = _schedule(loaded, middle, 0.5, scorer)
    times: dict[float | str, list[float]] = {ratio: [] for ratio in MEASURED_RATIOS} | {"stage": []}
    tokens: dict[float, float] = {}
    for round_number in range(ROUNDS + 1):
        for schedule, ratio in before_all:
            record = _run(loaded, inputs, schedule)
            tokens[ratio] = statistics.mean(record.tokens_per_layer[-1])
            times[ratio].append(record.milliseconds["prefill"])
        times["stage"].append(sum(_stage_ms(_run(loaded, inputs, staged))))
        if round_number == 0:  # warm-up
            for values in times.values():
                values.clear()
    batch = len(inputs["input_ids"])
    pairs = sorted((tokens[ratio], statistics.median(times[ratio])) for ratio in MEASURED_RATIOS)
    # More tokens never take less time; where noise says so, the running maximum says what is known.
    layer_ms = np.maximum.accumulate([ms / num_layers / batch for _, ms in pairs])
    return LatencyModel(
        tokens=tuple(count for count, _ in pairs),
        layer_ms=tuple(float(ms) for ms in layer_ms),
        stage_ms=statistics.median(times["stage"]) / batch,
        batch_size=batch,
        device=torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else "cpu",
    )


def _schedule(loaded: LoadedBackbone, layer: int, ratio: float, scorer: str) -> Schedule:
    return Schedule(
        backbone=loaded.identity,
        stages=(Stage(layer=layer, keep_ratio=ratio),),
        scorer=ScorerChoice(name=scorer),
    )


def _run(loaded: LoadedBackbone, inputs: dict[str, Tensor], schedule: Schedule) -> Any:
    import torch

    from pruning_runtime import pruned

    model: Any = loaded.backbone.model
    with torch.inference_mode(), pruned(model, schedule, timing=True) as record:
        model(**inputs, use_cache=False, logits_to_keep=1)
    return record


def _stage_ms(record: Any) -> tuple[float, float]:
    return record.milliseconds.get("scoring", 0.0), record.milliseconds.get("dropping", 0.0)
