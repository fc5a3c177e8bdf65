"""Positions `renumbered`: what is left is counted anew, whichever way a decoder makes its rotary tables."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pruning_runtime import UnsupportedBackbone, find_backbone, pruned
from pruning_runtime import renumbering as rotary
from tests.support import greedy
from tests.support.compaction_reference import dropped_from_record, renumbered_logits
from tests.support.own_mask_reference import append_tokens
from tests.support.rounding import rounding_bound
from tests.support.schedules import schedule_for
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import FAMILIES, Inputs

STEPS = 4


@dataclass(frozen=True)
class Case:
    """A family, ready to run; ``vision`` finds what `pruned` cannot find by itself."""

    build: Callable[..., PreTrainedModel]
    batch: Callable[[tuple[int, ...]], Inputs]
    extend: Callable[[Inputs, Tensor], Inputs] = append_tokens
    vision: Callable[[Inputs], Tensor] | None = None
    missing: str | None = None
    stages: tuple[tuple[int, float], ...] = ((0, 0.5), (2, 0.2))


def _first(name: str) -> Case:
    return Case(FAMILIES[name].build, FAMILIES[name].batch)


def _a(name: str) -> Case:
    family = FAMILIES_A[name]
    missing = None if family.available else f"this transformers has no {family.class_name}"
    # Recurrent layers have no attention to score with.
    stages = ((1, 0.5), (3, 0.2)) if family.recurrent else ((0, 0.5), (2, 0.2))
    return Case(family.build, family.batch, missing=missing, stages=stages)


def _b(name: str, **text: Any) -> Case:
    family = FAMILIES_B[name]
    vision = family.vision if family.needs_mask else None
    return Case(lambda: family.build(**text), family.batch, family.extend, vision, family.missing)


CASES = {
    "one number: llava": _first("llava"),
    "M-RoPE: qwen2_vl": _first("qwen2_vl"),
    "M-RoPE: qwen2_5_vl": _first("qwen2_5_vl"),
    "M-RoPE interleaved, DeepStack: qwen3_vl": _a("qwen3_vl"),
    "M-RoPE on half a head: glm4v": _a("glm4v"),
    "M-RoPE, positions given to layers: glm4v_moe": _a("glm4v_moe"),
    "M-RoPE between recurrent layers: qwen3_5": _a("qwen3_5"),
    "between convolutions: lfm2_vl": _a("lfm2_vl"),
    "complex, none in some layers: llama4": _b("llama4"),
    "by layer kind: gemma3": _b("gemma3"),
    "by layer kind, positional argument: gemma3n": _b("gemma3n", num_kv_shared_layers=0),
    "by layer kind, wider heads: gemma4": _b("gemma4_own_keys"),
    "by layer: molmo2": _b("molmo2"),
    "on a part of the keys: kimi": _b("kimi_k25"),
    "by length: phi4": _b("phi4_multimodal"),
}
generate = functools.partial(greedy.generate, steps=STEPS)


@pytest.mark.parametrize("rows", [(2, 1), (1,)], ids=["ragged", "one"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_renumbered_equals_a_compacted_run(
    case: Case, rows: tuple[int, ...], record_property: Callable[[str, object], None]
) -> None:
    if case.missing:
        pytest.skip(case.missing)
    model, inputs = case.build(), case.batch(rows)
    given = case.vision(inputs) if case.vision else None
    with pruned(
        model, schedule_for(model, *case.stages, positions="renumbered"), vision_mask=given
    ) as record:
        tokens, logits = generate(model, inputs)
    vision = find_backbone(model).vision_mask(inputs["input_ids"]) if given is None else given
    dropped = dropped_from_record(record.stages, inputs, vision)
    expected = renumbered_logits(model, inputs, tokens, dropped, extend=case.extend)
    worst = float((logits - expected).abs().max())
    record_property("worst_logit_difference", worst)
    with pruned(model, schedule_for(model, *case.stages), vision_mask=given) as same:
        _, original = generate(model, inputs)
    assert same.stages[0].kept_positions() == record.stages[0].kept_positions()
    difference = float((logits - original)[:, 0].abs().max())
    record_property("difference_to_original", difference)
    print(f"worst {worst:.1e}, to original {difference:.2f}")
    bound = rounding_bound(model, inputs)
    assert worst < bound
    assert difference > 10 * bound


@pytest.mark.parametrize("name", ["one number: llava", "M-RoPE, positions given to layers: glm4v_moe"])
def test_layers_that_take_positions_get_the_new_ones(name: str) -> None:
    """Kernels and decoders that look at ``position_ids`` themselves must not find the original ones."""
    case = CASES[name]
    model, inputs = case.build(), case.batch((1,))
    seen: list[Tensor] = []
    with pruned(model, schedule_for(model, *case.stages, positions="renumbered")) as record:
        hook = (
            find_backbone(model)
            .layers[-1]
            .register_forward_pre_hook(
                lambda _module, _args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
            )
        )
        generate(model, inputs)
        hook.remove()
    left = record.tokens_per_layer[-1][0]
    for step, positions in enumerate(seen):
        expected = torch.arange(left) if step == 0 else torch.tensor([left + step - 1])
        assert torch.equal(positions, expected.expand_as(positions))
    assert len(seen) == STEPS


@pytest.mark.parametrize("name", ["one number: llava", "M-RoPE: qwen2_vl"])
def test_a_second_turn_goes_on_counting(name: str) -> None:
    case = CASES[name]
    model, inputs = case.build(), case.batch((2, 1))
    turn = torch.randint(3, 100, (2, 4), generator=torch.Generator().manual_seed(5))
    cache = DynamicCache(config=model.config.get_text_config())
    with pruned(model, schedule_for(model, *case.stages, positions="renumbered")) as record:
        first, _ = generate(model, inputs, past_key_values=cache)
        ids = torch.cat([inputs["input_ids"], first, turn], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(first), torch.ones_like(turn)], 1)
        second, logits = generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)
    vision = find_backbone(model).vision_mask(inputs["input_ids"])
    dropped = dropped_from_record(record.stages, inputs, vision)
    answer = torch.cat([first, turn, second], 1)
    expected = renumbered_logits(model, inputs, answer, dropped, extend=case.extend)[:, -STEPS:]
    assert (logits - expected).abs().max() < rounding_bound(model, inputs)


def test_how_tables_are_made_is_not_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures are slow to read: at every layer of every token that took a tenth of decoding."""
    looked_up: list[str] = []
    signature = rotary.signature
    monkeypatch.setattr(
        rotary, "signature", lambda function: (looked_up.append(function), signature(function))[1]
    )
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch((1,))
    with pruned(model, schedule_for(model, (1, 0.5), positions="renumbered")):
        assert looked_up
        looked_up.clear()
        generate(model, inputs)
    assert not looked_up


# ---- decoders that cannot be renumbered


def _without_rotary(model: PreTrainedModel) -> None:
    model.get_decoder().rotary_emb = None


def _dynamic(model: PreTrainedModel) -> None:
    model.get_decoder().config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def _layers_that_rotate_themselves(model: PreTrainedModel) -> None:
    block = model.get_decoder().layers[2]

    def forward(hidden_states: Tensor, position_ids: Tensor | None = None) -> Tensor:
        raise AssertionError("only its signature is read: the set-up is refused before any layer runs")

    block.forward = forward


def _replace_rotary(make: Callable[..., Any]) -> Callable[[PreTrainedModel], None]:
    rotary = nn.Module()
    rotary.forward = make

    def change(model: PreTrainedModel) -> None:
        model.get_decoder().rotary_emb = rotary

    return change


def _shapeless(x: Tensor, position_ids: Tensor) -> Tensor:
    return position_ids.float().sum()[None, None]


def _of_length(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    table = torch.arange(position_ids.shape[1]).expand(len(position_ids), -1)[..., None].float()
    return table, table


REFUSALS: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "no module": (_without_rotary, "no `rotary_emb`"),
    "dynamic": (_dynamic, "'dynamic' RoPE depends on the longest sequence"),
    "own rotation": (_layers_that_rotate_themselves, r"layers \[2\] take no position_embeddings"),
    "other arguments": (_replace_rotary(lambda x, frequencies: x), r"layer 0 \(full_attention\).*TypeError"),
    "other shape": (_replace_rotary(_shapeless), "not have one entry per token"),
    "by place": (_replace_rotary(_of_length), "does not depend on the positions"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_refused_by_name_at_set_up(change: Callable[[PreTrainedModel], None], reason: str) -> None:
    model = FAMILIES["llava"].build()
    change(model)
    renumbered = schedule_for(model, (1, 0.5), positions="renumbered")
    message = f"LlavaForConditionalGeneration: .*{reason}.*; use positions 'original'"
    with pytest.raises(UnsupportedBackbone, match=message), pruned(model, renumbered):
        pass
    with pruned(model, schedule_for(model, (1, 0.5))):
        pass


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_shared_keys_are_refused(name: str) -> None:
    """A later layer would read keys that carry the numbers of an earlier one."""
    model = FAMILIES_B[name].build()
    schedule = schedule_for(model, (1, 0.5), positions="renumbered")
    with pytest.raises(UnsupportedBackbone, match="share keys"), pruned(model, schedule):
        pass
