"""Where the report's viewer draws vision tokens: on what the vision tower sees, or not at all, with a note."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pruning_runtime.backbone import find_backbone
from schedule_finder.report.placement import Placement, place_tokens
from schedule_finder.samples import Sample
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_models import FAMILIES
from tests.support.tower_reference import tower_cases

CASES = {name: case for name, case in tower_cases().items() if "video" not in name and "both" not in name}


def placed(model: Any, inputs: dict[str, Any], images: int = 0, processor: Any = None) -> Placement:
    loaded: Any = SimpleNamespace(backbone=find_backbone(model), processor=processor or SimpleNamespace())
    pictures = tuple(Image.new("RGB", (40 + 8 * number, 20)) for number in range(images))
    return place_tokens(loaded, Sample("s", pictures, "?", None), dict(inputs))


@pytest.mark.parametrize("name", CASES)
def test_every_token_has_a_place_of_its_own_or_a_note_says_why_not(name: str) -> None:
    case = CASES[name]
    model, inputs = case.build(attention=case.kernels[0]), case.batch()
    found = placed(model, inputs)
    vision = find_backbone(model).vision_mask(inputs["input_ids"])
    assert len(found.places) == int(vision.sum())
    there = [place for place in found.places if place is not None]
    assert len(set(there)) == len(there)
    assert (None in found.places) <= (found.note is not None)
    for panel, row, column in there:
        grid = found.panels[panel]
        assert 0 <= row < grid.rows
        assert 0 <= column < grid.columns
        assert 0 < grid.width <= 1
        assert 0 < grid.height <= 1


def test_a_square_picture_is_what_the_processor_made_of_the_image() -> None:
    family = FAMILIES["llava"]
    inputs = family.batch((1,))
    grey = torch.full_like(inputs["pixel_values"], 0.25)
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(do_normalize=True, image_mean=[0.5] * 3, image_std=[0.2, 0.4, 0.6])
    )
    found = placed(family.build(), inputs | {"pixel_values": grey}, processor=processor)
    (panel,) = found.panels
    assert (panel.rows, panel.columns, panel.width, panel.height) == (4, 4, 1.0, 1.0)
    assert np.asarray(panel.picture)[0, 0].tolist() == [140, 153, 166]
    assert found.places == tuple((0, token // 4, token % 4) for token in range(16))
    assert found.note is None


def test_tiles_are_separate_pictures_and_newline_tokens_have_no_place() -> None:
    family = FAMILIES_A["llava_next"]
    inputs = family.batch((1,), padded=False)
    tiles = inputs["pixel_values"].shape[1]
    levels = torch.linspace(0.2, 0.8, tiles).view(1, tiles, 1, 1, 1)
    found = placed(
        family.build(), inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"]) + levels}
    )
    assert [round(int(np.asarray(panel.picture)[0, 0, 0]) / 255, 1) for panel in found.panels] == [
        0.2,
        0.5,
        0.8,
    ]
    rows = inputs["image_sizes"][0].tolist()[0] // 4
    assert found.places.count(None) == rows
    assert found.note is not None
    assert f"{rows} tokens" in found.note
    assert {place[0] for place in found.places if place} == {0, 1, 2}


def test_padding_is_cut_off_and_several_images_are_in_order() -> None:
    family = FAMILIES_A["mistral3"]
    inputs = family.batch((3,))
    found = placed(family.build(), inputs)
    assert [panel.picture.size for panel in found.panels] == [(32, 32), (48, 16), (32, 24)]
    assert [(panel.rows, panel.columns) for panel in found.panels] == [(4, 4), (2, 6), (3, 4)]
    assert [place[0] for place in found.places if place] == [0] * 16 + [1] * 12 + [2] * 12


def test_absent_images_are_left_out() -> None:
    """Rows with fewer images than others have pictures of zeros, which the model does not run."""
    family = FAMILIES_A["idefics3"]
    inputs = family.batch((2, 1))
    assert inputs["pixel_values"].flatten(0, 1).shape[0] == 4
    assert len(placed(family.build(), inputs).panels) == 3


def test_lists_of_patches_are_placed_on_the_images_themselves() -> None:
    family = FAMILIES_A["qwen3_vl"]
    inputs = family.batch((2,))
    found = placed(family.build(), inputs, images=2)
    assert [panel.picture.size for panel in found.panels] == [(40, 20), (48, 20)]
    assert found.note is None
    other = placed(family.build(), inputs, images=1)
    assert other.panels == ()
    assert other.note is not None
    assert "one picture per image" in other.note


@pytest.mark.skipif(not FAMILIES_A["minicpmv4_6"].available, reason="not in this release of transformers")
def test_a_line_of_patches_is_not_taken_for_a_picture() -> None:
    family = FAMILIES_A["minicpmv4_6"]
    found = placed(family.build(), family.batch((1,)), images=1)
    assert [panel.picture.size for panel in found.panels] == [(40, 20)]


def test_a_tower_without_attention_is_placed_row_by_row_or_not_at_all() -> None:
    family = FAMILIES["llava"]
    model, inputs = family.build(), family.batch((1,))
    model.model.vision_tower = torch.nn.Identity()
    found = placed(model, inputs)
    assert found.note is not None
    assert "row by row" in found.note
    assert found.places[5] == (0, 1, 1)
    wide = torch.nn.functional.interpolate(inputs["pixel_values"], (16, 24))
    assert placed(model, inputs | {"pixel_values": wide}).panels == ()


def test_videos_are_not_placed() -> None:
    family = FAMILIES["llava"]
    loaded: Any = SimpleNamespace(backbone=find_backbone(family.build()))
    sample = Sample("s", (), "?", None, videos=((Image.new("RGB", (8, 8)),),))
    found = place_tokens(loaded, sample, family.batch((1,)))
    assert (found.panels, set(found.places)) == ((), {None})
    assert found.note == "tokens of videos are not placed"
