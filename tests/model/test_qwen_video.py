"""Qwen2-VL and Qwen2.5-VL with videos, whose M-RoPE counts time beside height and width: pruning equals masking."""

from __future__ import annotations

import pytest
import torch

from pruning_runtime import pruned
from tests.support.exactness import STAGES, generate, reference
from tests.support.rounding import rounding_bound
from tests.support.schedules import schedule_for
from tests.support.tiny_models import FAMILIES

QWEN = ["qwen2_vl", "qwen2_5_vl"]
# Images and videos of each row; rows differ in length, so all but one are padded on the left.
PROMPTS = {"videos": ((0, 0), (1, 2)), "an image, a video": ((1, 0), (0, 1)), "both": ((1, 0), (1, 0))}
# Shorter than a video is long in time: what comes after it stands at smaller positions than its last frame.
TEXTS = {"long text": [7, 9], "short text": [2, 1]}


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize(("images", "videos"), PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", QWEN)
def test_generate_equals_masking(
    family: str,
    attention: str,
    images: tuple[int, ...],
    videos: tuple[int, ...],
    text: list[int],
    stages: tuple[tuple[int, float], ...],
) -> None:
    tiny = FAMILIES[family]
    model = tiny.build(attention=attention)
    inputs = tiny.batch(images, videos_per_row=videos, text=text)
    assert not inputs["attention_mask"][:, 0].all()
    with pruned(model, schedule_for(model, *stages)) as record:
        tokens, logits = generate(model, inputs)
    assert (logits - reference(model, inputs, tokens, record)).abs().max() < rounding_bound(model, inputs)
    # Had nothing been dropped, the logits would be others: the comparison above can fail.
    unpruned = reference(model, inputs, tokens, None)
    with_vision = [row for row in range(2) if images[row] + videos[row]]
    assert (logits - unpruned)[with_vision].abs().amax((1, 2)).min() > 0.05


def test_the_time_between_frames_counts() -> None:
    """Qwen2.5-VL's `second_per_grid_ts` reaches the pruned layers: other times, other logits, both right."""
    tiny = FAMILIES["qwen2_5_vl"]
    model, inputs = tiny.build(), tiny.batch((0, 0), videos_per_row=(1, 2))
    schedule = schedule_for(model, (0, 0.5), (2, 0.2), scorer="strided")
    slower = inputs | {"second_per_grid_ts": inputs["second_per_grid_ts"] * 2}
    first = []
    for prompt in (inputs, slower):
        with pruned(model, schedule) as record:
            tokens, logits = generate(model, prompt)
        assert (logits - reference(model, prompt, tokens, record)).abs().max() < rounding_bound(model, inputs)
        first.append(logits[:, 0])
    assert (first[0] - first[1]).abs().amax(1).min() > 0.01


@pytest.mark.parametrize("family", QWEN)
def test_keeping_everything_changes_no_bit(family: str) -> None:
    tiny = FAMILIES[family]
    model, inputs = tiny.build(), tiny.batch((1, 0), videos_per_row=(0, 1))
    before = generate(model, inputs)
    with pruned(model, schedule_for(model, (0, 1.0), (3, 1.0))):
        inside = generate(model, inputs)
    assert all(torch.equal(expected, found) for expected, found in zip(before, inside, strict=True))
