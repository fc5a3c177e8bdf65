"""`residual: merged`: one token stands for all that are gone, and attention counts it as often."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import DynamicCache

from pruning_runtime import UnsupportedBackbone, pruned
from tests.support import greedy
from tests.support.compaction_reference import merged_logits
from tests.support.own_mask_reference import append_tokens
from tests.support.rounding import rounding_bound
from tests.support.schedules import schedule_for
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import FAMILIES

STEPS = 4
NAMES = ["llava", "qwen2_vl", "qwen2_5_vl", "internvl", "aya_vision", "gemma3", "mistral3", "qwen3_vl"]


def family_of(name: str):
    return FAMILIES.get(name) or FAMILIES_A.get(name) or FAMILIES_B[name]


generate = functools.partial(greedy.generate, steps=STEPS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stages", [((0, 0.5), (2, 0.2)), ((1, 0.4), (3, 0.0))], ids=["kept", "none at last"])
@pytest.mark.parametrize("name", NAMES)
def test_generate_equals_the_reference(
    name: str, stages: tuple[tuple[int, float], ...], attention: str
) -> None:
    """Windows, M-RoPE, ragged rows, two stages: at every generation step."""
    family = family_of(name)
    model, inputs = family.build(attention=attention), family.batch((2, 1))
    with pruned(model, schedule_for(model, *stages, dropped_tokens="merge"), keep_scores=True) as record:
        tokens, logits = generate(model, inputs)
    expected = merged_logits(model, inputs, tokens, record.stages, extend=append_tokens)
    assert (logits - expected).abs().max() < rounding_bound(model, inputs)
    with pruned(model, schedule_for(model, *stages)) as plain:
        _, without = generate(model, inputs)
    assert (logits - without).abs().max() > 1e-3  # it is something else than dropping
    assert plain.tokens_per_layer == record.tokens_per_layer


def test_no_token_gone_no_bit_changed() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1, 2))
    _, full = generate(model, inputs)
    with pruned(model, schedule_for(model, (1, 1.0), dropped_tokens="merge")):
        _, same = generate(model, inputs)
    assert (full == same).all()


def test_later_turns_count_the_merged_token_as_well() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1, 2))
    schedule = schedule_for(model, (0, 0.5), (2, 0.2), dropped_tokens="merge")
    cache = DynamicCache(config=model.config)
    with pruned(model, schedule, keep_scores=True) as record:
        first, _ = generate(model, inputs, past_key_values=cache)
        turn = torch.randint(3, 100, (2, 3), generator=torch.Generator().manual_seed(0))
        ids = torch.cat([inputs["input_ids"], first, turn], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(first), torch.ones_like(turn)], 1)
        tokens, logits = generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)
    answer = torch.cat([first, turn, tokens], 1)
    expected = merged_logits(model, inputs, answer, record.stages, extend=append_tokens)[:, -STEPS:]
    assert (logits - expected).abs().max() < rounding_bound(model, inputs)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gemma3n", "share keys"), ("qwen3_5", "recurrent layers"), ("lfm2_vl", "recurrent layers")],
)
def test_what_cannot_weigh_a_token_is_refused(name: str, reason: str) -> None:
    family = family_of(name)
    model = family.build()
    with (
        pytest.raises(UnsupportedBackbone, match=reason),
        pruned(model, schedule_for(model, (1, 0.5), dropped_tokens="merge")),
    ):
        pass
