"""Run a model's `generate` with a schedule, and record what each prompt cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from pruning_runtime import Schedule, pruned
from pruning_runtime.backbone import find_backbone
from pruning_runtime.geometry import DecoderShape
from pruning_runtime.record import Record
from schedule_finder.evaluation.prompt_cost import prompt_cost
from schedule_finder.lmms_eval.recording import PromptCosts


@contextmanager
def recorded_generation(
    model: PreTrainedModel, schedule: Schedule, add: Callable[[PromptCosts], None]
) -> Iterator[list[Exception]]:
    """`pruned`, with ``model.generate`` calling ``add`` for each prompt that it has answered.

    Yields:
        Errors of `generate`. Model wrappers of lmms-eval catch them and score an empty answer; the caller raises
        the first one instead.
    """
    shape, failures = find_backbone(model).shape, list[Exception]()
    with pruned(model, schedule, timing=True) as record:
        generate: Callable[..., Any] = getattr(model, "generate")  # noqa: B009  # typed as a Tensor or a Module

        def recorded(*args: Any, **kwargs: Any) -> Any:
            before = record.milliseconds.get("prefill", 0.0)
            try:
                output = generate(*args, **kwargs)
            except Exception as error:
                failures.append(error)
                raise
            prompts = len(kwargs["input_ids"]) if "input_ids" in kwargs else len(record.num_vision)
            spent = record.milliseconds["prefill"] - before
            for one in _costs(record, schedule, shape, prompts, spent):
                add(one)
            return output

        vars(model)["generate"] = recorded
        try:
            yield failures
        finally:
            del vars(model)["generate"]


def _costs(
    record: Record, schedule: Schedule, shape: DecoderShape, prompts: int, milliseconds: float
) -> Iterator[PromptCosts]:
    """One per prompt; beams of a prompt are equal rows of the prefill, and one of them stands for all."""
    beams = max(1, len(record.num_vision) // prompts)
    for row in range(0, beams * prompts, beams):
        vision, other = record.num_vision[row], record.num_other[row]
        per_layer = [layer[row] for layer in record.vision_tokens_per_layer]
        cost = prompt_cost(schedule, shape, per_layer, vision, other, record.pre_decoder_cost)
        yield PromptCosts(
            vision_tokens=vision,
            other_tokens=other,
            computed=cost.computed / shape.num_layers,
            flops=cost.flops,
            kv_bytes=record.cache_bytes / prompts,
            prefill_ms=milliseconds / prompts,
        )
