"""Everything that `generate` does, on a pruned model: each against the masked run of its own tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers.generation.streamers import BaseStreamer

from pruning_runtime import Record, pruned
from tests.support.exactness import reference
from tests.support.rounding import rounding_bound
from tests.support.schedules import schedule_for
from tests.support.tiny_models import FAMILIES, IMAGE, VIDEO, VISION_END, VISION_START, Inputs

STAGES = ((0, 0.5), (2, 0.2))
# A model with random weights may sample the token that stands for an image; no processor would allow it.
SPECIAL = [IMAGE, VIDEO, VISION_START, VISION_END]


def generate(model: PreTrainedModel, inputs: Inputs, **options: Any) -> tuple[Any, Record]:
    with pruned(model, schedule_for(model, *STAGES)) as record, torch.no_grad():
        output = model.generate(
            **inputs, **options, suppress_tokens=SPECIAL, output_logits=True, return_dict_in_generate=True
        )
    return output, record


def answer(output: Any, inputs: Inputs) -> Tensor:
    return output.sequences[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling(family: str) -> None:
    tiny = FAMILIES[family]
    model, inputs = tiny.build(), tiny.batch((2, 1))
    set_seed(0)
    output, record = generate(model, inputs, max_new_tokens=5, min_new_tokens=5, do_sample=True, top_k=20)
    expected = reference(model, inputs, answer(output, inputs), record)
    assert (torch.stack(output.logits, 1) - expected).abs().max() < rounding_bound(model, inputs)
    set_seed(1)
    other, _ = generate(model, inputs, max_new_tokens=5, min_new_tokens=5, do_sample=True, top_k=20)
    assert not torch.equal(output.sequences, other.sequences)


def test_several_sequences_of_one_prompt_keep_the_same_tokens() -> None:
    tiny = FAMILIES["llava"]
    # One image a row: transformers 5.17 repeats the images of rows with several in the wrong order.
    model, inputs = tiny.build(), tiny.batch((1, 1))
    set_seed(0)
    output, record = generate(
        model, inputs, max_new_tokens=4, min_new_tokens=4, do_sample=True, num_return_sequences=2
    )
    kept = record.stages[0].kept_positions()
    assert kept[0] == kept[1]
    assert kept[2] == kept[3]
    expanded = {name: value.repeat_interleave(2, 0) for name, value in inputs.items()}
    expected = reference(model, expanded, answer(output, inputs), record)
    assert (torch.stack(output.logits, 1) - expected).abs().max() < rounding_bound(model, inputs)


class _Collector(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten())

    def end(self) -> None:
        self.ended = True


def test_streaming() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1,))
    streamer = _Collector()
    output, _ = generate(model, inputs, max_new_tokens=4, do_sample=False, streamer=streamer)
    assert streamer.ended
    assert torch.equal(torch.cat(streamer.pieces), output.sequences[0])


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_logits_to_keep(keep: int) -> None:
    """The last logits are the last tokens', however few are asked for."""
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1, 2))
    with pruned(model, schedule_for(model, *STAGES)), torch.no_grad():
        everything = model(**inputs).logits
        some = model(**inputs, logits_to_keep=keep).logits
    assert some.shape[1] == (keep or inputs["input_ids"].shape[1])
    assert (some - everything[:, -some.shape[1] :]).abs().max() < rounding_bound(model, inputs)


def test_without_a_cache_every_step_prunes_the_whole_sequence_again() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1,))
    output, record = generate(
        model, inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=False
    )
    assert record.prefills == 3
    assert len(output.logits) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_at_its_noise_floor(dtype: torch.dtype) -> None:
    """The difference to masking is no larger than what the unpruned model's own cache costs."""
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build().to(dtype), tiny.batch((2, 1))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    options = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False}
    output, record = generate(model, inputs, **options)
    difference = (
        torch.stack(output.logits, 1) - reference(model, inputs, answer(output, inputs), record)
    ).abs()
    with torch.no_grad():
        plain = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    unpruned = reference(model, inputs, answer(plain, inputs), None)
    floor = (torch.stack(plain.logits, 1) - unpruned).abs().max()
    assert difference.max() <= max(3 * float(floor), 4 * torch.finfo(dtype).eps)


def test_gradients_are_not_asked_for() -> None:
    """Outside `no_grad` the forward still runs; pruning itself is for inference."""
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1,))
    with pruned(model, schedule_for(model, *STAGES)):
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
