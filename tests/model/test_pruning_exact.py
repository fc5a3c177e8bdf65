"""Pruning equals the unpruned sequence with the dropped tokens masked, at every generation step."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from pruning_runtime import Schedule, find_backbone, pruned
from tests.support.exactness import STAGES, generate, reference
from tests.support.rounding import rounding_bound
from tests.support.schedules import schedule_for
from tests.support.tiny_models import FAMILIES, LAYERS

SLIDING = {
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "use_sliding_window": True,
    "sliding_window": 9,
}

ROWS = {"one": (1,), "two alike": (1, 1), "ragged": (2, 1, 0)}


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_masking(
    family: str, attention: str, rows: tuple[int, ...], stages: tuple[tuple[int, float], ...]
) -> None:
    tiny = FAMILIES[family]
    model, inputs = tiny.build(attention=attention), tiny.batch(rows)
    with pruned(model, schedule_for(model, *stages)) as record:
        tokens, logits = generate(model, inputs)
    assert (logits - reference(model, inputs, tokens, record)).abs().max() < rounding_bound(model, inputs)
    # Had nothing been dropped, the first logits would be others: the comparison above can fail.
    unpruned = reference(model, inputs, tokens, None)
    pruned_rows = [row for row, images in enumerate(rows) if images]
    assert (logits - unpruned)[pruned_rows].abs().amax((1, 2)).min() > 0.05


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_sliding_windows_are_measured_in_original_positions(rows: tuple[int, ...]) -> None:
    tiny = FAMILIES["qwen2_5_vl"]
    model, inputs = tiny.build(**SLIDING), tiny.batch(rows)
    kinds = find_backbone(model).layer_kinds
    window = [SLIDING["sliding_window"] if kind == "sliding_attention" else None for kind in kinds]
    tokens, logits = generate(model, inputs)
    assert (logits - reference(model, inputs, tokens, None, window=window)).abs().max() < rounding_bound(
        model, inputs
    )
    with pruned(model, schedule_for(model, (0, 0.6), (2, 0.3))) as record:
        tokens, logits = generate(model, inputs)
    assert (logits - reference(model, inputs, tokens, record, window=window)).abs().max() < rounding_bound(
        model, inputs
    )


@pytest.mark.parametrize("scorer", ["random", "strided"])
def test_pruning_before_the_decoder(scorer: str) -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((2, 1, 0))
    with pruned(model, schedule_for(model, (-1, 0.5), (2, 0.25), scorer=scorer)) as record:
        tokens, logits = generate(model, inputs)
    assert (logits - reference(model, inputs, tokens, record)).abs().max() < rounding_bound(model, inputs)
    assert record.vision_tokens_per_layer[0] == [16, 8, 0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_no_bit(family: str, attention: str) -> None:
    tiny = FAMILIES[family]
    model, inputs = tiny.build(attention=attention), tiny.batch((2, 1, 0))
    before = generate(model, inputs)
    with pruned(model, schedule_for(model, (0, 1.0), (3, 1.0))):
        inside = generate(model, inputs)
    after = generate(model, inputs)
    for expected, found in zip(before * 2, inside + after, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("text", [[6, 11, 4], [6, 23, 23]], ids=["padded", "equally long"])
@pytest.mark.parametrize("scorer", ["text_guided", "strided"])
def test_a_row_is_pruned_as_it_would_be_alone(scorer: str, text: list[int]) -> None:
    """Rows that lose more than others are filled up with padding, or with dropped tokens where there is none."""
    tiny = FAMILIES["llava"]
    model, together = tiny.build(), tiny.batch((2, 1, 1), text=text)
    schedule = schedule_for(model, (0, 0.5), (2, 0.2), scorer=scorer)
    with pruned(model, schedule) as record, torch.no_grad():
        batch_logits = generate(model, together, max_new_tokens=1, min_new_tokens=1)[1]
    pixels = torch.split(together["pixel_values"], [2, 1, 1])
    for row in range(3):
        real = together["attention_mask"][row].bool()
        alone = {
            "input_ids": together["input_ids"][row : row + 1, real],
            "attention_mask": together["attention_mask"][row : row + 1, real],
            "pixel_values": pixels[row],
        }
        with pruned(model, schedule) as single:
            logits = generate(model, alone, max_new_tokens=1, min_new_tokens=1)[1]
        shift = int((~real).sum())
        for stage, single_stage in zip(record.stages, single.stages, strict=True):
            kept_alone = [position + shift for position in single_stage.kept_positions()[0]]
            assert stage.kept_positions()[row] == kept_alone
        assert (batch_logits[row] - logits[0]).abs().max() < rounding_bound(model, together)


def test_all_logits_stand_at_their_original_places() -> None:
    tiny = FAMILIES["llava"]
    model = tiny.build()
    left = tiny.batch((1, 1), text=[5, 9])
    real = left["attention_mask"].bool()
    # The same prompts padded on the right.
    right = {name: torch.zeros_like(left[name]) for name in ("input_ids", "attention_mask")}
    for name in right:
        for row in range(2):
            right[name][row, : int(real[row].sum())] = left[name][row, real[row]]
    right["pixel_values"] = left["pixel_values"]
    schedule = schedule_for(model, (1, 0.25))
    with pruned(model, schedule), torch.no_grad():
        logits_right = model(**right).logits
        positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits_left = model(**left, position_ids=positions).logits
    assert logits_right.shape[:2] == right["input_ids"].shape
    text = ~find_backbone(model).vision_mask(right["input_ids"])
    for row in range(2):
        length = int(real[row].sum())
        found = logits_right[row, :length][text[row, :length]]
        expected = logits_left[row, real[row]][text[row, :length]]
        assert (found - expected).abs().max() < rounding_bound(model, left)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_second_turn_on_the_pruned_cache(rows: tuple[int, ...]) -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch(rows)
    turn = torch.randint(3, 100, (len(rows), 4), generator=torch.Generator().manual_seed(5))
    cache = DynamicCache(config=model.config.get_text_config())
    with pruned(model, schedule_for(model, (0, 0.5), (2, 0.2))) as record:
        first, _ = generate(model, inputs, past_key_values=cache)
        # The last token of the first answer is not in the cache yet; it opens the second turn.
        ids = torch.cat([inputs["input_ids"], first, turn], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(first), torch.ones_like(turn)], 1)
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=3,
                min_new_tokens=3,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
    second = output.sequences[:, ids.shape[1] :]
    expected = reference(model, inputs, torch.cat([first, turn, second], 1), record)[:, -3:]
    assert (torch.stack(output.logits, 1) - expected).abs().max() < rounding_bound(model, inputs)


def test_beams_and_prompt_lookup_follow_the_cache() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1,))
    schedule = schedule_for(model, (0, 0.5), (2, 0.2))
    with pruned(model, schedule), torch.no_grad():
        greedy = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        lookup = model.generate(**inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
        beams = model.generate(
            **inputs, max_new_tokens=6, num_beams=3, return_dict_in_generate=True, output_scores=True
        )
    assert torch.equal(greedy, lookup)
    with pruned(model, schedule) as record:
        _tokens, _ = generate(model, inputs, max_new_tokens=1, min_new_tokens=1)
    # The winning beam's score, from the masked run of its own tokens.
    answer = beams.sequences[:, inputs["input_ids"].shape[1] :]
    logits = reference(model, inputs, answer, record)
    chosen = logits.log_softmax(-1).gather(2, answer[..., None]).sum()
    assert abs(float(beams.sequences_scores[0]) - float(chosen) / answer.shape[1]) < 1e-4


def test_what_the_record_says_is_what_the_cache_holds() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((2, 1, 0))
    cache = DynamicCache(config=model.config.get_text_config())
    schedule: Schedule = schedule_for(model, (1, 0.5), (3, 0.0))
    with pruned(model, schedule, timing=True) as record:
        generate(model, inputs, past_key_values=cache, max_new_tokens=1, min_new_tokens=1)
    assert record.tokens_per_layer[0] == inputs["attention_mask"].sum(1).tolist()
    for layer, counts in enumerate(record.tokens_per_layer):
        assert cache.layers[layer].keys.shape[2] == max(counts) or layer <= 1
    assert record.vision_tokens_per_layer == [[32, 16, 0]] * 2 + [[16, 8, 0]] * 2 + [[0, 0, 0]] * 2
    assert record.processed == pytest.approx((1 + 1 + 0.5 + 0.5) / 6)
    shapes = [cache.layers[layer].keys for layer in range(LAYERS)]
    assert record.cache_bytes == sum(2 * keys.numel() * 4 for keys in shapes)
    assert set(record.milliseconds) == {"prefill", "scoring", "dropping"}
    assert all(value > 0 for value in record.milliseconds.values())
