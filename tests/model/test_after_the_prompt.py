"""What follows a pruned prompt: later turns, drafts, other rows, a cropped cache."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pruning_runtime import PruningError, pruned
from tests.support import greedy
from tests.support.every_family import EVERY_FAMILY, TinyCase, tiny_case
from tests.support.exactness import generate, reference
from tests.support.rounding import rounding_bound
from tests.support.schedules import schedule_for
from tests.support.tiny_models import FAMILIES, IMAGE, Inputs

STAGES = {"inside": ((0, 0.5), (2, 0.2)), "before": ((-1, 0.5), (2, 0.2))}
FAR = 0.01
"""Wrong positions and masks move logits by more than this; rounding by a thousandth of it."""


def turn_after(case: TinyCase, first: Tensor, new: Tensor) -> dict[str, Tensor]:
    """Inputs of `generate` for the whole conversation, without the image."""
    ids = torch.cat([case.inputs["input_ids"], first, new], 1)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in case.inputs:
        types = case.inputs["token_type_ids"]
        found["token_type_ids"] = torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
    return found


@pytest.mark.parametrize(
    ("family", "fast"), [*((family, False) for family in EVERY_FAMILY), ("llava", True), ("qwen2_vl", True)]
)
@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
@pytest.mark.filterwarnings("ignore:fast=True")
def test_a_later_turn_equals_masking(family: str, fast: bool, stages: tuple[tuple[int, float], ...]) -> None:
    """Layer 0 is shortened by a stage before the decoder, and `generate` asks it what the cache holds."""
    case = tiny_case(family)
    new = torch.randint(3, 100, (1, 4), generator=torch.Generator().manual_seed(5))
    cache = DynamicCache(config=case.model.config.get_text_config(decoder=True))
    schedule = schedule_for(case.model, *stages, scorer="strided")
    with (
        pruned(case.model, schedule, vision_mask=case.vision_mask, fast=fast) as record,
        torch.no_grad(),
    ):
        first, _ = greedy.generate(case.model, case.inputs, steps=3, past_key_values=cache)
        output: Any = case.model.generate(
            **turn_after(case, first, new),
            past_key_values=cache,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            suppress_tokens=greedy.NOT_WORDS,
        )
    assert record.fast_prefills == fast
    second = output.sequences[:, -3:]
    expected = case.reference(torch.cat([first, new, second], 1), record)[:, -3:]
    bound = rounding_bound(case.model, case.inputs)
    assert bound < FAR
    assert (torch.stack(output.logits, 1) - expected).abs().max() < bound


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
def test_a_loop_without_position_ids_goes_on_at_the_right_positions(
    stages: tuple[tuple[int, float], ...],
) -> None:
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch((1,))
    with pruned(model, schedule_for(model, *stages, scorer="strided")) as record, torch.no_grad():
        output = model(**inputs)
        token = torch.tensor([[7]])
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 1)
        found = model(input_ids=token, attention_mask=mask, past_key_values=output.past_key_values).logits[
            :, -1
        ]
    expected = reference(model, inputs, torch.cat([token, token], 1), record)[:, 1]
    assert (found - expected).abs().max() < rounding_bound(model, inputs)


# ---- drafts


def drafting(model: PreTrainedModel, inputs: Inputs, **how: Any) -> Tensor:
    """Greedy ids of eight tokens without vision tokens."""
    vision = list(range(100, 120))
    with torch.no_grad():
        ids: Any = model.generate(
            **inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, suppress_tokens=vision, **how
        )
    return ids


@pytest.mark.parametrize(
    ("family", "scorer"),
    [
        ("llava", "text_guided"),
        ("qwen2_vl", "text_guided"),
        ("gemma3", "text_guided"),
        ("lfm2_vl", "strided"),
    ],
)
@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_drafts_change_no_token_and_no_kept_token(
    how: str, family: str, stages: tuple[tuple[int, float], ...], scorer: str
) -> None:
    """The prompt's end occurs earlier in it, so there is something to look up before the first call."""
    case = tiny_case(family)
    model, inputs = case.model, {name: value.clone() for name, value in case.inputs.items()}
    inputs["input_ids"][0, -2:] = inputs["input_ids"][0, -7:-5]
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if how == "assistant":
        options = {"assistant_model": copy.deepcopy(model)}
    with pruned(model, schedule_for(model, *stages, scorer=scorer)) as record:
        plain = drafting(model, inputs)
        text, kept = record.num_other, [stage.kept_positions() for stage in record.stages]
        drafted = drafting(model, inputs, **options)
        assert record.num_other == text
        assert [stage.kept_positions() for stage in record.stages] == kept
    assert torch.equal(plain, drafted)
    assert "_get_candidate_generator" not in vars(model)


def test_drafts_are_used_and_end_before_vision_tokens() -> None:
    """What follows the looked-up tokens in the prompt is the image."""
    case = tiny_case("llava")
    model, inputs = case.model, {name: value.clone() for name, value in case.inputs.items()}
    first = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    inputs["input_ids"][0, -1] = inputs["input_ids"][0, first - 1]
    assistant = copy.deepcopy(model)
    calls: list[int] = []
    counting = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with pruned(model, schedule_for(model, (0, 0.5))):
        plain = drafting(model, inputs)
        calls.clear()
        drafted = drafting(model, inputs, assistant_model=assistant)
        assert calls[0] == inputs["input_ids"].shape[1]
        assert max(calls[1:]) > 1
        looked_up = drafting(model, inputs, prompt_lookup_num_tokens=4, max_matching_ngram_size=1)
    counting.remove()
    assert torch.equal(plain, drafted)
    assert torch.equal(plain, looked_up)


def test_a_sampled_assistant_that_drafts_a_vision_token_does_no_harm() -> None:
    case = tiny_case("llava")
    assistant: Any = copy.deepcopy(case.model)
    real = assistant.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = real(*args, **kwargs)
        output.logits[..., IMAGE] += 100
        return output

    assistant.forward = functools.wraps(real)(forward)
    with pruned(case.model, schedule_for(case.model, (0, 0.5))), torch.no_grad():
        ids: Any = case.model.generate(
            **case.inputs, max_new_tokens=4, min_new_tokens=4, do_sample=True, assistant_model=assistant
        )
    assert ids.shape[1] == case.inputs["input_ids"].shape[1] + 4


# ---- other rows, a shorter cache


def two_prompts() -> tuple[PreTrainedModel, Inputs, Tensor]:
    """A model, two unlike prompts, and the mask with one more token."""
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch((1, 2), text=[5, 9])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    return model, inputs, mask


@pytest.mark.parametrize(
    ("way", "rows"),
    [("reorder", [1, 0]), ("select", [1]), ("select", [-1]), ("mask", [0]), ("repeat", [0, 0, 1, 1])],
)
def test_rows_of_the_cache_move_with_their_prompts(way: str, rows: list[int]) -> None:
    model, inputs, mask = two_prompts()
    tokens, positions = torch.tensor([[5], [6]]), mask.sum(1, keepdim=True) - 1
    with pruned(model, schedule_for(model, (0, 0.5), (2, 0.2))), torch.no_grad():
        cache = model(**inputs).past_key_values
        moved = copy.deepcopy(cache)
        expected = model(
            input_ids=tokens, attention_mask=mask, past_key_values=cache, position_ids=positions
        ).logits[rows]
        if way == "reorder":
            moved.reorder_cache(torch.tensor(rows))
        elif way == "select":
            moved.batch_select_indices(torch.tensor(rows))
        elif way == "mask":
            moved.batch_select_indices(torch.tensor([True, False]))
        else:
            moved.batch_repeat_interleave(2)
        found = model(
            input_ids=tokens[rows],
            attention_mask=mask[rows],
            past_key_values=moved,
            position_ids=positions[rows],
        ).logits
    assert (found - expected).abs().max() < rounding_bound(model, inputs)
    assert len(rows) != 2 or (found - expected.flip(0)).abs().max() > FAR


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
def test_the_end_of_a_prompt_can_be_taken_back(stages: tuple[tuple[int, float], ...], count: int) -> None:
    """Other tokens in its place give what a prompt with them gives, as the scores do not read it."""
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch((1,))
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, -count:] = torch.arange(5, 5 + count)
    with pruned(model, schedule_for(model, *stages, scorer="strided")), torch.no_grad():
        expected = model(**other).logits[:, -1]
        cache = model(**inputs).past_key_values
        cache.crop(-count)
        found = model(
            input_ids=other["input_ids"][:, -count:],
            attention_mask=inputs["attention_mask"],
            past_key_values=cache,
        ).logits[:, -1]
    assert (found - expected).abs().max() < rounding_bound(model, inputs)


def test_a_cache_that_is_cropped_into_the_image_is_refused() -> None:
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch((1,))
    after_image = int((inputs["input_ids"][0] == IMAGE).flip(0).int().argmax())
    with pruned(model, schedule_for(model, (0, 0.5), scorer="random")), torch.no_grad():
        cache = model(**inputs).past_key_values
        cache.crop(-after_image - 8)
        with pytest.raises(PruningError, match=r"cropped by \d+ positions.*new cache"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)


# ---- arguments of the call


@pytest.mark.parametrize("wrapped", [False, True])
def test_positional_arguments_are_those_by_name(wrapped: bool) -> None:
    model, inputs, mask = two_prompts()
    if wrapped:
        real = model.forward
        model.forward = lambda *args, **kwargs: real(*args, **kwargs)
    with pruned(model, schedule_for(model, (0, 0.5))) as record, torch.no_grad():
        found, texts = [], []
        for output in (
            model(**inputs),
            model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]),
        ):
            texts.append(record.num_other)
            found.append(
                model(
                    input_ids=torch.tensor([[5], [6]]),
                    attention_mask=mask,
                    past_key_values=output.past_key_values,
                    position_ids=mask.sum(1, keepdim=True) - 1,
                ).logits
            )
    assert texts[0] == texts[1]
    assert torch.equal(*found)


@pytest.mark.parametrize("places", [[1], [2, 5], [-1, 3]])
def test_logits_at_chosen_places_are_those_of_the_whole_prompt(places: list[int]) -> None:
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch((1,))
    with pruned(model, schedule_for(model, (0, 0.5))), torch.no_grad():
        expected = model(**inputs).logits[:, places]
        found = model(**inputs, logits_to_keep=torch.tensor(places)).logits
    assert (found - expected).abs().max() < rounding_bound(model, inputs)


def test_a_later_turn_that_hides_a_token_of_the_prompt_is_followed() -> None:
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch((1,))
    length, hidden = inputs["input_ids"].shape[1], inputs["input_ids"].shape[1] - 3
    tokens = torch.tensor([[5, 6, 7]])
    mask = torch.ones(1, length + 3, dtype=torch.long)
    mask[0, hidden] = 0
    found = {}
    for name, schedule in (
        ("kept", schedule_for(model, (0, 1.0))),
        ("dropped", schedule_for(model, (0, 0.9), scorer="strided")),
    ):
        for given in (torch.ones_like(mask), mask):
            with pruned(model, schedule), torch.no_grad():
                cache = model(**inputs).past_key_values
                output = model(
                    input_ids=tokens,
                    attention_mask=given,
                    past_key_values=cache,
                    position_ids=torch.arange(length, length + 3)[None],
                )
            found[name, int(given.sum())] = output.logits
    hides = found["kept", length + 2] - found["kept", length + 3]
    same = found["dropped", length + 2] - found["dropped", length + 3]
    assert hides.abs().max() > FAR
    assert (hides - same).abs().max() < hides.abs().max() / 2


@pytest.mark.parametrize("what", ["mask", "embeddings"])
def test_what_cannot_follow_a_prompt_is_refused(what: str) -> None:
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch((1,))
    with pruned(model, schedule_for(model, (0, 0.5))), torch.no_grad():
        if what == "mask":
            cache = model(**inputs).past_key_values
            mask = torch.zeros(1, 1, 1, inputs["input_ids"].shape[1] + 1)
            with pytest.raises(PruningError, match=r"must be \[batch, length\]"):
                model(input_ids=torch.tensor([[5]]), attention_mask=mask, past_key_values=cache)
        else:
            cache = model(input_ids=torch.tensor([[5, 6]])).past_key_values
            embeddings = model.get_input_embeddings()(inputs["input_ids"])
            with pytest.raises(PruningError, match="prompt without vision tokens"):
                model(inputs_embeds=embeddings, past_key_values=cache)


def test_a_vision_mask_serves_every_beam() -> None:
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch((2,))
    vision = inputs["input_ids"] == IMAGE
    with torch.no_grad():
        ids: Any = model.get_input_embeddings()(inputs["input_ids"])
        ids[vision] = (
            model.model.get_image_features(inputs["pixel_values"])
            .pooler_output[0]
            .repeat(2, 1)[: int(vision.sum())]
        )
    given = {"inputs_embeds": ids, "attention_mask": inputs["attention_mask"]}
    schedule = schedule_for(model, (0, 0.5))
    with pruned(model, schedule, vision_mask=vision) as record:
        model.generate(**given, max_new_tokens=2, num_beams=2)
        assert record.num_vision == (int(vision.sum()),) * 2
    two = {name: value.repeat(2, 1, 1)[:, : vision.shape[1]] for name, value in (("inputs_embeds", ids),)}
    two["inputs_embeds"][1] = two["inputs_embeds"][1].flip(0)
    with (
        pruned(model, schedule, vision_mask=vision),
        torch.no_grad(),
        pytest.raises(PruningError, match="1 rows for 2 different prompts"),
    ):
        model(**two)
    with (
        pruned(model, schedule, vision_mask=vision[:, 1:]),
        pytest.raises(PruningError, match="that the model receives"),
    ):
        generate(model, given)
