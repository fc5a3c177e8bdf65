"""Vision features that are computed once: which calls share them, and that results stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from pruning_runtime import find_backbone, pruned
from pruning_runtime.schedule import Stage
from schedule_finder.measuring.token_policy import TokenPolicy
from schedule_finder.measuring.vision_features import VisionFeatures, _without_states, output_bytes
from tests.support.answer_kls import POLICY, a_model_of, answer_kl_of
from tests.support.schedules import schedule_for
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import FAMILIES

ALL = {**FAMILIES, **FAMILIES_A, **FAMILIES_B}
NOT_SHARED = {"llama4", "phi4_multimodal", "phi4_sliding", "gemma3n"}
"""Llama 4 projects features behind the call that gives them; Phi-4's vision part is a piece of its decoder; the
tests of Gemma 3n have no images, since its tower comes from another library."""


@contextmanager
def counted_vision(model: Any) -> Iterator[list[str]]:
    """Names of the modules of the vision part that ran, one entry per call."""
    others = {*find_backbone(model).text_model.modules(), model.get_output_embeddings()}
    calls: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.named_modules()
        if module not in others and not list(module.children()) and list(module.parameters())
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("family", sorted(ALL))
def test_the_vision_part_runs_once_and_logits_are_equal_bit_for_bit(family: str) -> None:
    model, inputs = a_model_of(family)
    features = VisionFeatures(find_backbone(model))
    schedule = schedule_for(model, (1, 0.5))
    with pruned(model, schedule):
        plain = logits(model, inputs)
    with counted_vision(model) as calls:
        with features.reused():
            whole = logits(model, inputs)
        once = len(calls)
        for _ in range(2):
            with features.reused(), pruned(model, schedule):
                assert torch.equal(logits(model, inputs), plain)
        again = len(calls) - once
    if family not in NOT_SHARED:
        assert again == 0
        assert once > 0
    assert torch.equal(logits(model, inputs), whole)


@pytest.mark.parametrize("family", sorted(name for name in FAMILIES if FAMILIES[name].videos))
def test_so_do_videos(family: str) -> None:
    tiny = FAMILIES[family]
    model, inputs = tiny.build(), tiny.batch((1, 0), videos_per_row=(1, 1))
    features, whole = VisionFeatures(find_backbone(model)), logits(model, inputs)
    with features.reused(), counted_vision(model) as calls:
        assert torch.equal(logits(model, inputs), whole)
        once = len(calls)
        assert torch.equal(logits(model, inputs), whole)
        assert len(calls) == once > 0


def test_generate_shares_features_with_forward() -> None:
    model, inputs = a_model_of("llava")
    features = VisionFeatures(find_backbone(model))
    with torch.inference_mode(), counted_vision(model) as calls, features.reused():
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        once = len(calls)
        logits(model, inputs)
    assert len(calls) == once > 0


def test_other_tensors_have_other_features() -> None:
    """Also a tensor that takes the place of one that is gone: a kept input stays alive."""
    model, inputs = a_model_of("llava")
    features = VisionFeatures(find_backbone(model))
    for seed in range(4):
        pixels = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(seed))
        changed = inputs | {"pixel_values": pixels}
        expected = logits(model, changed)
        with features.reused():
            assert torch.equal(logits(model, changed), expected)
        del pixels, changed


def test_what_does_not_fit_is_computed_each_time() -> None:
    model, inputs = a_model_of("llava")
    features, whole = VisionFeatures(find_backbone(model), most_bytes=10), logits(model, inputs)
    with counted_vision(model) as calls, features.reused():
        assert torch.equal(logits(model, inputs), whole)
        once = len(calls)
        assert torch.equal(logits(model, inputs), whole)
    assert len(calls) == 2 * once > 0


def test_the_model_is_unchanged_afterwards_also_after_an_error() -> None:
    model, inputs = a_model_of("llava")
    before = dict(vars(model.model))
    with pytest.raises(ValueError, match="unpack"), VisionFeatures(find_backbone(model)).reused():
        logits(model, inputs | {"pixel_values": torch.zeros(1)})
    assert vars(model.model) == before


def test_a_tower_rule_gets_a_tower_that_runs() -> None:
    model, batch = a_model_of("llava")
    stages = (Stage(layer=-1, keep_ratio=0.5),)
    answer_kl = answer_kl_of(model, [batch])
    answer_kl.measure(stages, POLICY)
    with counted_vision(model) as calls:
        shared = answer_kl.measure(stages, POLICY)
        assert not calls
        tower = answer_kl.measure(stages, TokenPolicy("fastervlm"))
        assert calls
    assert not np.array_equal(tower, shared)


def test_features_that_are_no_field_of_an_output_are_kept_and_counted() -> None:
    """In transformers 5.17, Gemma 4, Mistral 3 and Idefics 3 set them so."""
    output: Any = BaseModelOutput(last_hidden_state=torch.zeros(2, 3), hidden_states=(torch.zeros(5),))
    output.pooler_output = torch.ones(4)
    kept = _without_states(output)
    assert kept.hidden_states is None
    assert kept.last_hidden_state is output.last_hidden_state
    assert kept.pooler_output is output.pooler_output
    assert output_bytes(kept) == 4 * (2 * 3 + 4)
    assert output_bytes(output) == 4 * (2 * 3 + 4 + 5)
