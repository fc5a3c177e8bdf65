"""What the lmms-eval plug-in does with a model's `generate`, without lmms-eval."""

from __future__ import annotations

import pytest
import torch

from pruning_runtime import pruned
from schedule_finder.lmms_eval.generation import recorded_generation
from schedule_finder.lmms_eval.recording import PromptCosts
from tests.support.schedules import schedule_for
from tests.support.tiny_models import FAMILIES

FAMILY = FAMILIES["llava"]


def test_every_prompt_is_recorded_and_the_model_is_as_before() -> None:
    model, inputs = FAMILY.build().eval(), FAMILY.batch((1, 1))
    schedule = schedule_for(model, (1, 0.5))
    generate = {**inputs, "max_new_tokens": 2, "do_sample": False}
    with pruned(model, schedule) as record:
        expected = model.generate(**generate)
    found: list[PromptCosts] = []
    with recorded_generation(model, schedule, found.append) as failures:
        assert torch.equal(model.generate(**generate), expected)
        model.generate(**generate, num_beams=2)
    assert failures == []
    assert "generate" not in vars(model)
    assert len(found) == 4  # two prompts, twice; beams are not prompts
    for index, one in enumerate(found):
        row = index % 2
        per_layer = [layer[row] for layer in record.vision_tokens_per_layer]
        assert (one.vision_tokens, one.other_tokens) == (record.num_vision[row], record.num_other[row])
        assert one.computed == sum(per_layer) / record.num_layers
        assert one.flops > 0
        assert one.prefill_ms > 0
    assert found[0].kv_bytes == record.cache_bytes / 2
    assert found[2].kv_bytes > 1.5 * found[0].kv_bytes  # one cache per beam


def test_an_error_of_generate_is_kept() -> None:
    """Wrappers of lmms-eval catch it, and would score an empty answer."""
    model, inputs = FAMILY.build().eval(), FAMILY.batch((1,))
    with (
        recorded_generation(model, schedule_for(model, (1, 0.5)), lambda _one: None) as failures,
        pytest.raises(Exception, match="max_new_tokens"),
    ):
        model.generate(**inputs, max_new_tokens=-1)
    assert len(failures) == 1
    assert "generate" not in vars(model)
