"""Separators among the image features stay when the schedule protects them, and compete when it ranks them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pruning_runtime import Record, find_backbone, pruned
from pruning_runtime.model_quirks.image_newline import find_image_newlines, image_newline_mask
from tests.support.exactness_a import check, family_named
from tests.support.schedules import schedule_for
from tests.support.tiny_families_a import FAMILIES_A, Modality
from tests.support.tiny_models import FAMILIES, Inputs

ROWS = (2, 1, 0)
CASES: list[tuple[str, Modality]] = [
    ("llava_next", "image"),
    ("llava_next_video", "image"),
    ("llava_onevision", "image"),
    ("granite4_vision", "image"),
    ("llava_onevision", "video"),
]


def decoder_input(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """The embeddings that the decoder is given, ``[batch, length, width]``, with features that come later added."""
    seen: list[Tensor] = []

    def look(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        embeddings = kwargs["inputs_embeds"].clone()
        for features in (kwargs.get("deepstack_features") or {}).values():
            embeddings[kwargs["vision_mask"][..., 0]] += features
        seen.append(embeddings)

    hook = model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


def separators_of(model: PreTrainedModel, inputs: Inputs) -> list[list[int]]:
    """Where the model put its newlines, per row: where its decoder's input changes when they do."""
    newline: nn.Parameter = model.model.image_newline
    before = decoder_input(model, inputs)
    with torch.no_grad():
        newline.add_(1.0)
        changed = (decoder_input(model, inputs) != before).any(-1)
        newline.sub_(1.0)
    return [row.nonzero().flatten().tolist() for row in changed]


def run(model: PreTrainedModel, inputs: Inputs, *stages: tuple[int, float], **schedule: Any) -> Record:
    """One pruned prefill, with its scores."""
    with pruned(model, schedule_for(model, *stages, **schedule), keep_scores=True) as record, torch.no_grad():
        model(**inputs)
    return record


def best(record: Record, model: PreTrainedModel, inputs: Inputs, first: list[list[int]]) -> list[list[int]]:
    """What the only stage should keep: ``first``, then the best scores; ties to the earlier position."""
    (stage,) = record.stages
    seen = find_backbone(model).vision_mask(inputs["input_ids"])
    kept = []
    for row, count in enumerate(stage.keep):
        scores = stage.scores[row].tolist()
        vision = seen[row].nonzero().flatten().tolist()
        ranked = sorted(
            vision, key=lambda place: (place not in first[row], place in first[row] or -scores[place], place)
        )
        kept.append(sorted(ranked[:count]))
    return kept


@pytest.mark.parametrize(("name", "modality"), CASES)
def test_protected_separators_stay_and_pruning_stays_exact(name: str, modality: Modality) -> None:
    family = family_named(name)
    model, inputs = family.build(), family.batch(ROWS, modality=modality)
    image_newlines = separators_of(model, inputs)
    assert [bool(row) for row in image_newlines] == [bool(count) for count in ROWS]
    record = check(family, model, inputs, schedule_for(model, (0, 0.6), (2, 0.4)))
    for stage in record.stages:
        for kept, wanted in zip(stage.kept_positions(), image_newlines, strict=True):
            assert set(wanted) <= set(kept)


@pytest.mark.parametrize("image_newlines", ["protected", "ranked"])
@pytest.mark.parametrize(("name", "modality"), CASES)
def test_the_rest_of_the_places_goes_to_the_best_scores(
    name: str, modality: Modality, image_newlines: str
) -> None:
    family = family_named(name)
    model, inputs = family.build(), family.batch(ROWS, modality=modality)
    found = separators_of(model, inputs)
    record = run(model, inputs, (1, 0.25), image_newlines=image_newlines)
    first = found if image_newlines == "protected" else [[]] * len(ROWS)
    kept = record.stages[0].kept_positions()
    assert kept == best(record, model, inputs, first)
    # The same numbers of tokens either way; not the same tokens, but where the few newlines of videos score high.
    assert [len(row) for row in kept] == [math.floor(count / 4 + 0.5) for count in record.num_vision]
    if modality == "image":
        assert (kept != best(record, model, inputs, found)) == (image_newlines == "ranked")


def test_where_not_all_separators_can_stay_the_first_do() -> None:
    family = family_named("llava_next")
    model, inputs = family.build(), family.batch(ROWS)
    image_newlines = separators_of(model, inputs)
    record = run(model, inputs, (0, 0.06), (2, 0.0))
    few, none = record.stages
    for kept, row, count in zip(few.kept_positions(), image_newlines, few.keep, strict=True):
        assert count < len(row) or not row
        assert kept == row[:count]
    assert none.kept_positions() == [[], [], []]


@pytest.mark.parametrize("scorer", ["strided", "random"])
def test_rules_by_position_honour_separators_from_before_the_decoder_on(scorer: str) -> None:
    family = family_named("llava_next")
    model, inputs = family.build(), family.batch(ROWS)
    image_newlines = separators_of(model, inputs)
    vision = find_backbone(model).vision_mask(inputs["input_ids"])
    content = [
        [place for place in row.nonzero().flatten().tolist() if place not in image_newlines[number]]
        for number, row in enumerate(vision)
    ]
    record = run(model, inputs, (-1, 0.6), (2, 0.3), scorer=scorer)
    assert [stage.layer for stage in record.stages] == [-1, 2]
    for stage in record.stages:
        for row, kept in enumerate(stage.kept_positions()):
            assert set(image_newlines[row]) <= set(kept)
            left = [place for place in kept if place not in image_newlines[row]]
            assert len(left) == stage.keep[row] - len(image_newlines[row])
            if scorer == "strided":
                # As if the image newlines were not there: evenly over the content that reached the stage.
                total = len(content[row])
                assert left == [
                    place
                    for rank, place in enumerate(content[row])
                    if (rank + 1) * len(left) // total > rank * len(left) // total
                ]
            content[row] = left


@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_separators_are_found_in_half_precision(kind: str) -> None:
    family = family_named("llava_next")
    model, inputs = family.build(), family.batch(ROWS)
    image_newlines = separators_of(model, inputs)
    if kind == "bfloat16":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        record = run(model, inputs, (1, 0.4))
    for kept, wanted in zip(record.stages[0].kept_positions(), image_newlines, strict=True):
        assert set(wanted) <= set(kept)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_without_separators_prune_alike_under_both(name: str) -> None:
    tiny = FAMILIES[name]
    model, inputs = tiny.build(), tiny.batch(ROWS)
    backbone = find_backbone(model)
    assert find_image_newlines(model, backbone.text_model) == ()
    logits = []
    for image_newlines in ("protected", "ranked"):
        schedule = schedule_for(model, (0, 0.5), (2, 0.2), image_newlines=image_newlines)
        with pruned(model, schedule), torch.no_grad():
            logits.append(model(**inputs).logits)
    assert torch.equal(*logits)


def test_only_vectors_that_the_modules_around_the_decoder_own_are_separators() -> None:
    family = family_named("llava_next")
    model = family.build()
    backbone = find_backbone(model)
    assert backbone.text_model.norm.weight.shape == model.model.image_newline.shape
    assert find_image_newlines(model, backbone.text_model) == ((model.model, "image_newline"),)


def test_a_separator_is_told_by_all_its_entries_and_at_vision_tokens_only() -> None:
    owner = nn.Module()
    owner.mark = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 0.0]))
    near, far = torch.tensor([0.0, 0.01, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 0.1])
    given = torch.stack([owner.mark, owner.mark + near, owner.mark + far, -owner.mark, owner.mark])[None]
    vision = torch.tensor([[True, True, True, True, False]])
    found = image_newline_mask([(owner, "mark")], [given], vision)
    assert found.tolist() == [[True, True, False, False, False]]
    elsewhere = image_newline_mask([(owner, "mark")], [torch.zeros_like(given), given], vision)
    assert torch.equal(elsewhere, found)


def test_a_separator_does_not_stand_for_what_is_gone() -> None:
    """The kept token that takes in the others is a picture token, however low image newlines score."""
    family = FAMILIES_A["llava_next"]
    model, inputs = family.build(), family.batch((1, 1))
    marks = separators_of(model, inputs)
    with torch.no_grad():  # the worst scores there can be: keys that nothing attends to
        model.model.image_newline.mul_(1e-3)
    cache = DynamicCache(config=model.config.get_text_config())
    with pruned(model, schedule_for(model, (1, 0.5), dropped_tokens="merge")), torch.no_grad():
        model(**inputs, past_key_values=cache)
    segment = cache.pruned_prompt.segments[-1]
    for row, mark in enumerate(marks):
        heavy = segment.index[row][segment.sizes[row] > 1].tolist()
        assert len(heavy) == 1
        assert heavy[0] not in mark
