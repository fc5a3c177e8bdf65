"""Every family prunes exactly: against masking, or against compaction where a layer is recurrent."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from pruning_runtime import PruningError, ScheduleError, pruned
from tests.support.exactness_a import STEPS, check, dropped, family_named, generate, reference
from tests.support.own_mask_reference import append_tokens
from tests.support.rounding import rounding_bound
from tests.support.schedules import schedule_for
from tests.support.tiny_families_a import FAMILIES_A, Modality

ROWS = (2, 1, 0)
STAGES = {"two stages": ((0, 0.5), (2, 0.2)), "one stage": ((1, 0.4),)}
# Where every other layer is recurrent, stages stand at the others.
HYBRID_STAGES = {"two stages": ((1, 0.5), (3, 0.2)), "one stage": ((1, 0.4),)}

CASES = [
    pytest.param(name, modality, id=f"{name}-{modality}")
    for name, family in FAMILIES_A.items()
    for modality in family.modalities
]


@pytest.mark.parametrize(("name", "modality"), CASES)
def test_unpruned_generation_equals_the_reference(name: str, modality: Modality) -> None:
    """The batch and the reference are right: without pruning they agree with what `generate` does."""
    family = family_named(name)
    model, inputs = family.build(), family.batch(ROWS, modality=modality)
    tokens, logits = generate(model, inputs)
    assert (logits - reference(family, model, inputs, tokens, [])).abs().max() < rounding_bound(model, inputs)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "equally long"])
@pytest.mark.parametrize(("name", "modality"), CASES)
def test_generate_equals_the_reference(name: str, modality: Modality, padded: bool, stages: str) -> None:
    family = family_named(name)
    model, inputs = family.build(), family.batch(ROWS, modality=modality, padded=padded)
    chosen = HYBRID_STAGES if family.recurrent else STAGES
    record = check(family, model, inputs, schedule_for(model, *chosen[stages]))
    assert record.cache_bytes > 0
    assert len(set(record.num_vision)) == 3


@pytest.mark.parametrize("name", FAMILIES_A)
def test_eager_attention(name: str) -> None:
    family = family_named(name)
    model = family.build(attention="eager")
    stages = (HYBRID_STAGES if family.recurrent else STAGES)["two stages"]
    check(family, model, family.batch((2, 1), seed=1), schedule_for(model, *stages))


@pytest.mark.parametrize("name", FAMILIES_A)
def test_all_logits_of_a_forward_stand_at_their_places(name: str) -> None:
    """Text behind the images, of which `forward` gives every prediction at once, as for a likelihood."""
    family = family_named(name)
    model, inputs = family.build(), family.batch(ROWS)
    stages = (HYBRID_STAGES if family.recurrent else STAGES)["two stages"]
    answer = torch.randint(3, 100, (len(ROWS), STEPS), generator=torch.Generator().manual_seed(7))
    with pruned(model, schedule_for(model, *stages)) as record, torch.no_grad():
        logits = model(**append_tokens(inputs, answer[:, :-1])).logits
    length = inputs["input_ids"].shape[1]
    assert logits.shape[1] == length + STEPS - 1
    # The answer rates vision tokens too, so what leaves is read off this record.
    gone = [(layer, positions[:, :length]) for layer, positions in dropped(model, inputs, record)]
    expected = reference(family, model, inputs, answer, gone)
    assert (logits[:, length - 1 :] - expected).abs().max() < rounding_bound(model, inputs)


@pytest.mark.parametrize(("name", "modality"), CASES)
def test_second_turn_on_the_pruned_cache(name: str, modality: Modality) -> None:
    family = family_named(name)
    model, inputs = family.build(), family.batch(ROWS, modality=modality)
    stages = (HYBRID_STAGES if family.recurrent else STAGES)["two stages"]
    turn = torch.randint(3, 100, (len(ROWS), 4), generator=torch.Generator().manual_seed(5))
    cache = DynamicCache(config=model.config.get_text_config())
    with pruned(model, schedule_for(model, *stages)) as record:
        first, _ = generate(model, inputs, past_key_values=cache)
        # The last token of the first answer is not in the cache yet; it opens the second turn.
        whole = append_tokens(inputs, torch.cat([first, turn], 1))
        per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
        second, logits = generate(
            model, {key: whole[key] for key in per_token if key in whole}, past_key_values=cache
        )
    tokens = torch.cat([first, turn, second], 1)
    expected = reference(family, model, inputs, tokens, dropped(model, inputs, record))[:, -STEPS:]
    assert (logits - expected).abs().max() < rounding_bound(model, inputs)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES_A.items() if family.recurrent])
def test_recurrent_layers_cannot_score_but_can_be_pruned_before(name: str) -> None:
    family = family_named(name)
    model, inputs = family.build(), family.batch(ROWS)
    with (
        pytest.raises(ScheduleError, match=r"layer 2 .* has no keys of its own"),
        pruned(model, schedule_for(model, (2, 0.5))),
    ):
        pass
    # Before the decoder, and before the first layer with a cache length: positions must not come from it.
    check(family, model, inputs, schedule_for(model, (-1, 0.6), (0, 0.3), scorer="strided"))


def test_later_calls_that_do_not_fit_are_refused_behind_a_recurrent_layer() -> None:
    """The first layer has no keys to count, so another must notice."""
    family = family_named("lfm2_vl")
    model, inputs = family.build(), family.batch((1, 1))
    cache = DynamicCache(config=model.config.get_text_config())
    turn = torch.full((2, 3), 50)
    with pruned(model, schedule_for(model, (1, 0.5))), torch.no_grad():
        model(**inputs, past_key_values=cache)
        with pytest.raises(PruningError, match="mask of the whole conversation"):
            model(input_ids=turn, attention_mask=torch.ones_like(turn), past_key_values=cache)
