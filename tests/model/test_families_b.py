"""The Gemma line, PaliGemma, Molmo2, Llama 4, Phi-4-multimodal, Kimi-K2.5: pruning equals masking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from pruning_runtime import ScheduleError, UnsupportedBackbone, find_backbone, pruned
from tests.support.exactness_b import STEPS, family_named, generate, given_mask, reference
from tests.support.masked_reference import dropped_positions
from tests.support.own_mask_reference import find_layers, own_mask_logits
from tests.support.rounding import rounding_bound
from tests.support.schedules import schedule_for
from tests.support.tiny_families_b import FAMILIES_B, FamilyB
from tests.support.tiny_models import Inputs

STAGES = {"two stages": ((0, 0.5), (2, 0.2)), "one stage": ((1, 0.4),)}


@pytest.mark.parametrize("name", FAMILIES_B)
def test_unpruned_generation_equals_the_reference(name: str) -> None:
    """The reference knows a family's inputs rightly: without pruning it is what `generate` does."""
    family = family_named(name)
    model, inputs = family.build(), family.batch()
    tokens, logits = generate(model, inputs)
    assert (logits - reference(family, model, inputs, tokens, None)).abs().max() < rounding_bound(
        model, inputs
    )


CASES = [(name, kernel) for name, family in FAMILIES_B.items() for kernel in family.kernels]
BATCHES: dict[str, Callable[[FamilyB], Inputs]] = {
    "ragged": FamilyB.batch,
    "one": lambda family: family.batch((1,)),
    "level": FamilyB.level_batch,
}


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_generate_equals_masking(
    name: str,
    kernel: str,
    rows: Callable[[FamilyB], Inputs],
    stages: tuple[tuple[int, float], ...],
    record_property: Callable[[str, object], None],
) -> None:
    family = family_named(name)
    model, inputs = family.build(attention=kernel), rows(family)
    with pruned(model, schedule_for(model, *stages), vision_mask=given_mask(family, inputs)) as record:
        tokens, logits = generate(model, inputs)
    worst = (logits - reference(family, model, inputs, tokens, record)).abs().max()
    record_property("worst_logit_difference", float(worst))
    assert worst < rounding_bound(model, inputs)
    # Had nothing been dropped, the logits would be others: the comparison above can fail.
    unpruned = reference(family, model, inputs, tokens, None)
    with_images = family.vision(inputs).any(1)
    assert (logits - unpruned)[with_images].abs().amax((1, 2)).min() > 0.05


def test_geometry_where_heads_or_layers_differ() -> None:
    kimi = find_backbone(FAMILIES_B["kimi_k25"].build()).shape
    assert (kimi.head_dim, kimi.value_dim) == (8 + 4, 6)
    gemma4 = find_backbone(FAMILIES_B["gemma4_large"].build()).shape
    assert (gemma4.head_dim, gemma4.num_kv_heads, gemma4.value_dim) == (
        (8 + 16) // 2,
        round((2 + 1) / 2),
        None,
    )
    sizes = [32, 32, 64, 64, 96, 96]
    gemma3n = find_backbone(FAMILIES_B["gemma3n"].build(intermediate_size=sizes)).shape
    assert gemma3n.intermediate_size == sum(sizes) / len(sizes)
    sliding = find_backbone(FAMILIES_B["phi4_sliding"].build())
    assert set(sliding.layer_kinds) == {"sliding_attention"}


def test_latent_cache_is_measured() -> None:
    """Kimi's cache keeps a latent and one rotated key per token, not the keys and values of all heads."""
    family = FAMILIES_B["kimi_k25"]
    model, inputs = family.build(), family.batch((1,))
    with pruned(model, schedule_for(model, (1, 0.5))) as record:
        generate(model, inputs, max_new_tokens=1, min_new_tokens=1)
    tokens = sum(count for layer in record.tokens_per_layer for count in layer)
    assert record.cache_bytes == tokens * (16 + 4) * 4


def test_temperature_follows_the_original_positions() -> None:
    """Llama 4 scales queries of its layers without RoPE by their place in the cache, every 8192 tokens."""
    family = family_named("llama4")
    model, inputs = family.build(floor_scale=5, attn_scale=1.0), family.batch()
    with pruned(model, schedule_for(model, (0, 0.5), (2, 0.2))) as record:
        tokens, logits = generate(model, inputs)
    assert (logits - reference(family, model, inputs, tokens, record)).abs().max() < rounding_bound(
        model, inputs
    )


SHARING = ["gemma3n", "gemma4"]


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", SHARING)
def test_tokens_may_leave_between_layers_that_share_keys(
    name: str, rows: Callable[[FamilyB], Inputs]
) -> None:
    """The keys stay as they were computed; later layers must not see those that have left since."""
    family = family_named(name)
    model, inputs = family.build(), rows(family)
    schedule = schedule_for(model, (1, 0.6), (3, 0.4), (4, 0.2), scorer="strided")
    with pruned(model, schedule, vision_mask=given_mask(family, inputs)) as record:
        tokens, logits = generate(model, inputs)
    assert len(record.stages) == 3
    assert (logits - reference(family, model, inputs, tokens, record)).abs().max() < rounding_bound(
        model, inputs
    )


@pytest.mark.parametrize("name", SHARING)
def test_layers_without_keys_of_their_own_cannot_score(name: str) -> None:
    family = family_named(name)
    model = family.build()
    with (
        pytest.raises(ScheduleError, match=r"layer 4 .* no keys of its own .* \[0, 1, 2, 3\]"),
        pruned(model, schedule_for(model, (4, 0.5))),
    ):
        pass


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("stages", [((1, 0.4),), ((3, 0.4),), ((4, 0.4),)], ids=str)
def test_the_last_logits_alone(
    stages: tuple[tuple[int, float], ...], rows: Callable[[FamilyB], Inputs]
) -> None:
    """Gemma 4 carries only as many tokens through its last layers as logits are asked for."""
    family = family_named("gemma4")
    model, inputs = family.build(), rows(family)
    with pruned(model, schedule_for(model, *stages, scorer="strided")) as record, torch.no_grad():
        every = model(**family.extend(inputs, inputs["input_ids"][:, :0])).logits
        last = model(**family.extend(inputs, inputs["input_ids"][:, :0]), logits_to_keep=3).logits
    # The tokens before the last ones, fed one by one, so that the reference gives the same three logits.
    prompt = {
        name: value[:, :-2] if value.shape[1:] == inputs["input_ids"].shape[1:] else value
        for name, value in inputs.items()
    }
    vision = family.vision(prompt)
    dropped = [
        (stage.layer + 1, dropped_positions(prompt, vision, stage.kept_positions()))
        for stage in record.stages
    ]
    tokens = torch.cat([inputs["input_ids"][:, -2:], inputs["input_ids"][:, :1]], 1)
    expected = own_mask_logits(model, prompt, tokens, dropped, extend=family.extend)
    assert (every[:, -3:] - expected).abs().max() < rounding_bound(model, inputs)
    assert (last - expected).abs().max() < rounding_bound(model, inputs)


def test_per_layer_inputs_as_wide_as_the_prompt_is_long() -> None:
    """Which dimension runs over the prompt is not told by its size alone."""
    family = family_named("gemma4")
    inputs = family.batch((1,))
    model = family.build(hidden_size_per_layer_input=inputs["input_ids"].shape[1])
    with pruned(model, schedule_for(model, (0, 0.5), (2, 0.2))) as record:
        tokens, logits = generate(model, inputs)
    assert (logits - reference(family, model, inputs, tokens, record)).abs().max() < rounding_bound(
        model, inputs
    )


@pytest.mark.parametrize("name", [name for name in FAMILIES_B if name not in SHARING])
def test_renumbered_positions(name: str) -> None:
    """Layers after a stage count the tokens that are left; every layer has its own rotary table for it."""
    family = family_named(name)
    model, inputs = family.build(), family.batch()
    stages = ((0, 0.5), (2, 0.2))
    with pruned(model, schedule_for(model, *stages, positions="renumbered")) as record:
        tokens, logits = generate(model, inputs)
    dropped = [
        (stage.layer + 1, dropped_positions(inputs, family.vision(inputs), stage.kept_positions()))
        for stage in record.stages
    ]
    hooks = [
        block.register_forward_pre_hook(_count_anew(inputs, layer, dropped), with_kwargs=True)
        for layer, block in enumerate(find_layers(model))
    ]
    try:
        expected = own_mask_logits(model, inputs, tokens, dropped, extend=family.extend)
    finally:
        for hook in hooks:
            hook.remove()
    assert (logits - expected).abs().max() < rounding_bound(model, inputs)
    original = own_mask_logits(model, inputs, tokens, dropped, extend=family.extend)
    assert (logits - original).abs().max() > 0.05


def _count_anew(inputs: Inputs, layer: int, dropped_from: list[tuple[int, Tensor]]) -> Callable[..., Any]:
    """A pre-hook that gives the n-th token left in a row the rotary table of the row's n-th token."""
    gone = [dropped for first, dropped in dropped_from if layer >= first]
    real = inputs["attention_mask"].bool()

    def hook(_module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not gone:
            return None
        batch, length = args[0].shape[:2]
        left = torch.ones(batch, length, dtype=torch.bool)
        left[:, : real.shape[1]] = real & ~torch.stack(gone).any(0)
        begin = (real.cumsum(1) == 0).sum(1, keepdim=True)
        place = begin + (left.cumsum(1) - 1).clamp(min=0)

        def pick(table: Tensor) -> Tensor:
            return table.gather(1, place[..., None].expand(-1, -1, table.shape[-1]))

        tables = kwargs["position_embeddings"]
        tables = tuple(map(pick, tables)) if isinstance(tables, tuple) else pick(tables)
        return args, {**kwargs, "position_embeddings": tables}

    return hook


@pytest.mark.parametrize("name", SHARING)
def test_shared_keys_cannot_be_renumbered(name: str) -> None:
    model = family_named(name).build()
    with (
        pytest.raises(UnsupportedBackbone, match="share keys"),
        pruned(model, schedule_for(model, (1, 0.5), positions="renumbered")),
    ):
        pass


# A later turn of PaliGemma would be a prefix again, which its cache cannot serve.
@pytest.mark.parametrize("name", [name for name in FAMILIES_B if not name.startswith("paligemma")])
def test_second_turn_on_the_pruned_cache(name: str) -> None:
    family = family_named(name)
    model, inputs = family.build(), family.batch()
    turn = torch.randint(3, 100, (len(family.rows), 4), generator=torch.Generator().manual_seed(5))
    cache = DynamicCache(config=model.config.get_text_config())
    schedule = schedule_for(model, (0, 0.5), (2, 0.2))
    with pruned(model, schedule, vision_mask=given_mask(family, inputs)) as record:
        first, _ = generate(model, inputs, past_key_values=cache)
        # The last token of the first answer is not in the cache yet; it opens the second turn.
        ids = torch.cat([inputs["input_ids"], first, turn], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(first), torch.ones_like(turn)], 1)
        second, logits = generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)
    answer = torch.cat([first, turn, second], 1)
    expected = reference(family, model, inputs, answer, record)[:, -STEPS:]
    assert (logits - expected).abs().max() < rounding_bound(model, inputs)
