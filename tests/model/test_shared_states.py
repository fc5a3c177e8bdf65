"""Layers that several schedules have in common: they run once, and results stay the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from pruning_runtime import PruningError, ScheduleError, UnsupportedBackbone, find_backbone
from pruning_runtime.schedule import Stage
from schedule_finder.measuring.answer_kl import AnswerKL
from schedule_finder.measuring.shared_states import SharedStates
from schedule_finder.measuring.token_policy import TokenPolicy
from tests.support.answer_kls import POLICY, a_model_of, answer_kl_length, answer_kl_of
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import FAMILIES

ALL = {**FAMILIES, **FAMILIES_A, **FAMILIES_B}

POLICIES = (POLICY, TokenPolicy("text_guided", pre_decoder="strided"), TokenPolicy("v2drop"))
"""The first one reads attention before the decoder, and the last one reads a layer's input and output."""
MORE_POLICIES = (
    POLICY,
    TokenPolicy("text_guided", "merge"),
    TokenPolicy("strided"),
    TokenPolicy("text_guided", pre_decoder="divprune"),
    TokenPolicy("random"),
    TokenPolicy("random", seed=1),
)


def stages_of(*stages: tuple[int, float]) -> tuple[Stage, ...]:
    return tuple(Stage(layer=layer, keep_ratio=ratio) for layer, ratio in stages)


def without_sharing(answer_kl: AnswerKL, model: Any) -> AnswerKL:
    answer_kl._states = SharedStates(find_backbone(model), most_bytes=0)
    return answer_kl


@contextmanager
def layers_that_run(model: Any) -> Iterator[list[int]]:
    """Decoder layers whose attention ran, in order."""
    ran: list[int] = []
    blocks = find_backbone(model).layers
    hooks = [
        block.self_attn.register_forward_hook(lambda *_args, layer=layer: ran.append(layer))
        for layer, block in enumerate(blocks)
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def measured(answer_kl: AnswerKL, policy: TokenPolicy, layers: Sequence[int]) -> dict[Any, Any]:
    """Answer KL of schedules in an order in which each finds something that an earlier one left."""
    last = layers[-1]
    several = [
        stages_of((last, 0.3)),
        stages_of((layers[0], 0.5), (last, 0.2)),
        stages_of((-1, 0.5), (last, 0.2)),
        stages_of((-1, 0.5), (last, 0.0)),
        stages_of((-1, 0.5)),
        stages_of((-1, 0.4), (last, 0.2)),
        stages_of((layers[-2], 0.3), (last, 0.1)),
    ]
    found: dict[Any, Any] = {}
    for stages in several:
        key = tuple((stage.layer, stage.keep_ratio) for stage in stages)
        try:
            found[key] = answer_kl.measure(stages, policy).tolist()
        except (UnsupportedBackbone, ScheduleError, PruningError) as error:
            found[key] = str(error)
    return found


@pytest.mark.parametrize("family", sorted(ALL))
def test_results_are_those_of_whole_runs_bit_for_bit(family: str) -> None:
    """DeepStack, windows, shared keys, recurrent layers, and whatever ran before."""
    model, inputs = a_model_of(family)
    backbone = find_backbone(model)
    layers = [layer for layer in range(backbone.shape.num_layers - 1) if backbone.has_own_attention(layer)]
    shared, whole = answer_kl_of(model, [inputs]), without_sharing(answer_kl_of(model, [inputs]), model)
    for policy in MORE_POLICIES if family == "llava" else POLICIES:
        found = measured(shared, policy, layers)
        assert found == measured(whole, policy, layers), policy
    assert any(isinstance(values, list) and max(values) > 0 for values in found.values())
    if shared._states._usable:
        assert shared.forwards < whole.forwards


@pytest.mark.parametrize(
    "family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "gemma3n", "qwen3_5", "llama4"]
)
def test_single_stages_are_those_of_whole_runs_bit_for_bit(family: str) -> None:
    model, inputs = a_model_of(family)
    backbone = find_backbone(model)
    shared, whole = answer_kl_of(model, [inputs]), without_sharing(answer_kl_of(model, [inputs]), model)
    layers = [layer for layer in (-1, 0, 1, 3) if backbone.has_own_attention(max(layer, 0))]
    for layer, found in shared.measure_single(layers, (0.5, 0.0), POLICY):
        for ratio, values in zip((0.5, 0.0), found, strict=True):
            assert values.tolist() == whole.measure(stages_of((layer, ratio)), POLICY).tolist()


def test_single_stages_begin_at_their_layer() -> None:
    tiny = FAMILIES["llava"]
    model = tiny.build()
    answer_kl = answer_kl_of(model, [tiny.batch((1,))])
    given = answer_kl_length(answer_kl)
    assert given > 0
    before = answer_kl.forwards
    with layers_that_run(model) as ran:
        list(answer_kl.measure_single([1, 3], (0.5, 0.0), POLICY))
    # The first one runs whole and leaves the states that enter layers 1 and 3.
    assert ran == [*range(6), *range(3, 6), *range(1, 6), *range(1, 6)]
    tokens = tiny.batch((1,))["input_ids"].shape[1] + given
    kept = [4 * tokens + 2 * (tokens - 8), tokens + 2 * (tokens - 16)]
    kept += [tokens + 4 * (tokens - 8), tokens + 4 * (tokens - 16)]
    assert answer_kl.forwards - before == pytest.approx(sum(kept) / (6 * tokens))


@pytest.mark.parametrize("rule", ["text_guided", "strided"])
def test_schedules_with_the_same_tokens_before_the_decoder_begin_at_the_next_stage(rule: str) -> None:
    model, inputs = a_model_of("llava")
    answer_kl = answer_kl_of(model, [inputs])
    policy = TokenPolicy("text_guided", pre_decoder=rule)
    answer_kl.measure(stages_of((-1, 0.5), (4, 0.2)), policy)
    # Layer 0 runs each time, since a rule may score with it before the decoder.
    cases = {
        ((-1, 0.5), (4, 0.0)): [0, 4, 5],
        ((-1, 0.5), (3, 0.0)): [0, 3, 4, 5],
        ((-1, 0.5),): [0, 4, 5],
        ((-1, 0.4), (4, 0.2)): [*range(6)],
        ((4, 0.2),): [*range(6)],
        ((4, 0.1),): [4, 5],
    }
    for stages, expected in cases.items():
        with layers_that_run(model) as ran:
            answer_kl.measure(stages_of(*stages), policy)
        assert ran == expected, stages


def test_other_prompts_have_other_states() -> None:
    tiny = FAMILIES["llava"]
    model, batches = tiny.build(), [tiny.batch((1,)), tiny.batch((1,), seed=1)]
    answer_kl = answer_kl_of(model, batches)
    stages = stages_of((4, 0.2))
    answer_kl.measure(stages, POLICY)
    again = answer_kl.measure(stages_of((4, 0.1)), POLICY)
    assert again[0] != again[1]
    apart = [answer_kl_of(model, [batch]).measure(stages_of((4, 0.1)), POLICY) for batch in batches]
    assert again.tolist() == np.concatenate(apart).tolist()


def test_states_that_do_not_fit_make_room_or_are_not_kept() -> None:
    tiny = FAMILIES["llava"]
    model, batches = tiny.build(), [tiny.batch((1,)), tiny.batch((1,), seed=1)]
    answer_kl = answer_kl_of(model, batches)
    tokens = batches[0]["input_ids"].shape[1] + answer_kl_length(answer_kl)
    width = find_backbone(model).shape.hidden_size
    one = 4 * tokens * width
    answer_kl._states = SharedStates(find_backbone(model), most_bytes=3 * one)
    answer_kl.measure(stages_of((4, 0.2)), POLICY)  # wants four states
    assert len(answer_kl._states._kept) == 3
    assert answer_kl._states._bytes == 3 * one
    with layers_that_run(model) as ran:
        answer_kl.measure(stages_of((-1, 0.5), (4, 0.2)), POLICY)
        assert ran == [*range(6), *range(6)]
        del ran[:]
        answer_kl.measure(stages_of((-1, 0.5), (4, 0.1)), POLICY)
        assert ran == [0, 4, 5, 0, 4, 5]
    assert answer_kl._states._bytes <= 3 * one
