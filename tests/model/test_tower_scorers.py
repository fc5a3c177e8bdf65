"""Rules that read the vision tower, inside `pruned`, on small stock models."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from transformers import PreTrainedModel

from pruning_runtime import Schedule, pruned
from pruning_runtime.backbone import find_backbone
from pruning_runtime.errors import PruningError, ScheduleError, UnsupportedBackbone
from pruning_runtime.record import Record
from pruning_runtime.scorers import SCORERS, TowerScorer
from pruning_runtime.setup import tower_needs
from pruning_runtime.tower import TowerStatistics, tower_tap
from tests.support import tower_rule_references as references
from tests.support.exactness import reference
from tests.support.greedy import generate
from tests.support.rounding import rounding_bound
from tests.support.schedules import schedule_for
from tests.support.tiny_models import Inputs
from tests.support.tower_reference import tower_cases, vision_of

CASES = tower_cases()
RULES = sorted(name for name, rule in SCORERS.items() if issubclass(rule, TowerScorer))
DROPPING = [name for name in RULES if SCORERS[name].joins is None]
SHAPES = [
    name
    for name in ("llava", "qwen2_5_vl", "qwen2_vl both", "internvl", "ernie4_5_vl_moe video")
    if name in CASES
]


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    return CASES[name].build()


def run(
    model: PreTrainedModel, inputs: Inputs, schedule: Schedule, **options: bool
) -> tuple[Record, torch.Tensor]:
    with pruned(model, schedule, **options) as record, torch.no_grad():
        logits = model(**inputs).logits
    return record, logits


def statistics_of(model: PreTrainedModel, inputs: Inputs, schedule: Schedule) -> TowerStatistics:
    needs = tower_needs(schedule)
    assert needs is not None
    with tower_tap(find_backbone(model), needs) as tap, torch.no_grad():
        model(**inputs)
        return tap.statistics(vision_of(model, inputs))


def expected_positions(
    rule: str, statistics: TowerStatistics, vision: torch.Tensor, ratio: float
) -> list[list[int]]:
    """What the slow reference keeps of every image, as positions in each row."""
    where, kept = vision.nonzero().tolist(), [[] for _ in vision]
    for image in statistics.image.unique().tolist():
        tokens = (statistics.image == image).nonzero().flatten().tolist()
        one = references.Image(
            rows=int(statistics.rows[tokens[0]]),
            columns=int(statistics.columns[tokens[0]]),
            saliency={name: values[tokens].numpy() for name, values in statistics.saliency.items()},
            states=None if statistics.states is None else statistics.states[tokens].numpy(),
            keys=None if statistics.keys is None else statistics.keys[tokens].numpy(),
            features=torch.zeros(len(tokens), 1).numpy(),
            has_cls=statistics.has_cls,
        )
        # The tests' images have places in the order of their tokens.
        places = statistics.row[tokens] * one.columns + statistics.column[tokens]
        assert places.tolist() == list(range(one.number))
        share = len(tokens) * ratio
        assert share == int(share)
        found = getattr(references, rule)(one, int(share))
        for token in found[0] if isinstance(found, tuple) else found:
            row, position = where[tokens[token]]
            kept[row].append(position)
    return [sorted(row) for row in kept]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SHAPES)
def test_every_image_keeps_what_the_reference_keeps(name: str, rule: str) -> None:
    model, inputs = model_of(name), CASES[name].batch()
    schedule = schedule_for(model, (-1, 0.5), scorer=rule)
    record, _ = run(model, inputs, schedule)
    statistics = statistics_of(model, inputs, schedule)
    expected = expected_positions(rule, statistics, vision_of(model, inputs), 0.5)
    assert record.stages[0].kept_positions() == expected


@pytest.mark.parametrize("rule", DROPPING)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_generation_equals_the_masked_sequence(name: str, rule: str) -> None:
    model, inputs = model_of(name), CASES[name].batch()
    with pruned(model, schedule_for(model, (-1, 0.75), (1, 0.5), scorer=rule)) as record:
        tokens, logits = generate(model, inputs, steps=3)
    assert (logits - reference(model, inputs, tokens, record)).abs().max() < rounding_bound(model, inputs)


@pytest.mark.parametrize("rule", RULES)
def test_the_library_generates_with_the_tokens_of_a_plain_forward(rule: str) -> None:
    # Newer releases run the tower before they call the model.
    model, inputs = model_of("qwen2_5_vl"), CASES["qwen2_5_vl"].batch()
    schedule = schedule_for(model, (-1, 0.5), scorer=rule)
    expected = run(model, inputs, schedule)[0].stages[0].kept_positions()
    with pruned(model, schedule) as record, torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert record.stages[0].kept_positions() == expected
        model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2)
        assert record.stages[0].kept_positions() == [row for row in expected for _ in range(2)]


@pytest.mark.parametrize("rule", RULES)
def test_a_row_alone_keeps_what_it_keeps_in_a_batch(rule: str) -> None:
    model, both = model_of("llava"), CASES["llava"].batch()
    schedule = schedule_for(model, (-1, 0.4), scorer=rule)
    together = run(model, both, schedule)[0].stages[0].kept_positions()
    alone = {key: values[:1] for key, values in both.items()} | {"pixel_values": both["pixel_values"][:2]}
    assert run(model, alone, schedule)[0].stages[0].kept_positions() == together[:1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("newlines", ["protected", "ranked"])
def test_image_newlines_are_kept_or_ranked_last(rule: str, newlines: str) -> None:
    model, inputs = model_of("llava_next"), CASES["llava_next"].batch()
    schedule = schedule_for(model, (-1, 0.5), scorer=rule, image_newlines=newlines)
    record, _ = run(model, inputs, schedule)
    statistics = statistics_of(model, inputs, schedule)
    vision = vision_of(model, inputs)
    is_newline = torch.zeros_like(vision).masked_scatter(vision, statistics.image < 0)
    for row, kept in enumerate(record.stages[0].kept_positions()):
        number = int(is_newline[row, kept].sum())
        assert number == (int(is_newline[row].sum()) if newlines == "protected" else 0)
        assert len(kept) == round(0.5 * int(vision[row].sum()))


def test_merged_tokens_change_the_answer_and_dropped_ones_follow_the_same_choice() -> None:
    model, inputs = model_of("llava"), CASES["llava"].batch()
    for rule in ("visionzip", "vscan"):
        schedule = schedule_for(model, (-1, 0.5), scorer=rule)
        record, logits = run(model, inputs, schedule)
        masked = reference(model, inputs, logits[:, -1:].argmax(-1), record)
        assert (logits[:, -1] - masked[:, 0]).abs().max() > 100 * rounding_bound(model, inputs)


@pytest.mark.parametrize("rule", RULES)
def test_keeping_everything_changes_nothing(rule: str) -> None:
    model, inputs = model_of("qwen2_5_vl"), CASES["qwen2_5_vl"].batch()
    with torch.no_grad():
        plain = model(**inputs).logits
    assert torch.equal(run(model, inputs, schedule_for(model, (-1, 1.0), scorer=rule))[1], plain)


def test_static_shapes_take_the_plain_path_with_the_reason() -> None:
    model, inputs = model_of("llava"), CASES["llava"].batch()
    schedule = schedule_for(model, (-1, 0.5), scorer="fastervlm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = run(model, inputs, schedule)[1]
    with pytest.warns(UserWarning, match="'fastervlm' reads the vision tower"):
        found = run(model, inputs, schedule, fast=True)[1]
    torch.testing.assert_close(found, expected)


def test_models_and_prompts_without_a_tower_are_refused_in_one_line() -> None:
    text_only = CASES["gemma3n"].build()
    with (
        pytest.raises(UnsupportedBackbone, match="Gemma3nForCausalLM has no vision tower"),
        pruned(text_only, schedule_for(text_only, (-1, 0.5), scorer="hiprune")),
    ):
        pass
    granite, inputs = CASES["granite4_vision"].build(), CASES["granite4_vision"].batch()
    with pytest.raises(UnsupportedBackbone, match="Granite4VisionForConditionalGeneration: nothing of"):
        run(granite, inputs, schedule_for(granite, (-1, 0.5), scorer="fastervlm"))
    llava, inputs = model_of("llava"), CASES["llava"].batch()
    schedule = schedule_for(llava, (-1, 0.5), scorer="scope")
    embeddings = llava.get_input_embeddings()(inputs["input_ids"]).detach()
    with (
        pytest.raises(PruningError, match="vision tower did not run"),
        pruned(llava, schedule, vision_mask=vision_of(llava, inputs)),
    ):
        llava(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
    with (
        pytest.raises(ScheduleError, match="merges dropped tokens by its own rule"),
        pruned(llava, schedule_for(llava, (-1, 0.5), scorer="vscan", dropped_tokens="merge")),
    ):
        pass
