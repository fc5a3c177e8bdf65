"""Photo scenes and their questions, on the drawn stand-in: answers are derived again from the grid of names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from schedule_finder.errors import InputError
from schedule_finder.samples import choose_samples
from schedule_finder.samples.photo import PhotoData
from schedule_finder.samples.photo_assets import (
    BACKGROUNDS,
    HELD_OUT_BACKGROUNDS,
    NAMES,
    drawn_assets,
    load_photographs,
)
from schedule_finder.samples.photo_questions import LEARNT_TYPES, QUESTION_TYPES, ask
from schedule_finder.samples.photo_scenes import (
    CELLS,
    IMAGE_SIZE,
    POSITIONS,
    TOKENS_PER_SIDE,
    cell_tokens,
    draw_scene,
    is_held_out,
    render_scene,
    scene_generator,
)

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]


def grid_of(scene) -> list[list[str]]:
    """The names as three rows of three; "" where there is nothing."""
    flat = [""] * 9
    for one in scene.objects:
        flat[one.cell] = one.name
    return [flat[0:3], flat[3:6], flat[6:9]]


def find(grid: list[list[str]], name: str) -> tuple[int, int]:
    (only,) = [(row, column) for row in range(3) for column in range(3) if grid[row][column] == name]
    return only


def answer_from_grid(grid: list[list[str]], question: str) -> str:
    """The answer, from the words of the question and the grid alone."""
    flat = [name for row in grid for name in row]
    last = question.rstrip("?.").split()[-1]
    if question.startswith("What is at the"):
        position = question.removeprefix("What is at the ").rstrip("?")
        return flat[POSITIONS.index(position)] or "nothing"
    if question.startswith("Where"):
        row, column = find(grid, last)
        return POSITIONS[3 * row + column]
    if question.startswith("Is there"):
        return "yes" if last in flat else "no"
    if question.startswith("How many times"):
        return NUMBERS[flat.count(last)]
    if question.startswith("How many objects"):
        return NUMBERS[9 - flat.count("")]
    if question.startswith("Describe"):
        row = ("top", "middle", "bottom").index(question.split()[2])
        return ", ".join(filter(None, grid[row])) or "nothing"
    if question.startswith("List"):
        return ", ".join(filter(None, flat))
    row, column = find(grid, last)
    if "object left of" in question:
        column, row = column - 1, row + 1
    elif "left of" in question:
        column -= 1
    else:
        row += 1
    assert row >= 0
    assert column >= 0
    return grid[row][column]


@pytest.mark.parametrize("question_type", QUESTION_TYPES)
def test_the_grid_gives_the_same_answer(question_type):
    asked = 0
    for number in range(150):
        rng = scene_generator("held_out", 3, number)
        scene = draw_scene(rng, "held_out")
        question = ask(scene, question_type, rng)
        if question is not None:
            asked += 1
            assert answer_from_grid(grid_of(scene), question.text) == question.answer
            assert question.question_type == question_type
    assert asked > 15


@pytest.mark.parametrize("question_type", ["at", "where", "left", "below", "two_hop"])
def test_the_regions_are_the_cells_of_the_answer(question_type):
    """An object that is asked for by position lies, with all its pixels that count, in one of the regions."""
    for number in range(60):
        rng = scene_generator("held_out", 4, number)
        scene = draw_scene(rng, "held_out")
        question = ask(scene, question_type, rng)
        if question is None:
            continue
        if question_type == "where":
            cell = POSITIONS.index(question.answer)
        elif question.answer == "nothing":
            continue
        else:
            cells = [one.cell for one in scene.objects if one.name == question.answer]
            assert any(set(cell_tokens(cell)) <= set(question.regions) for cell in cells)
            continue
        assert question.regions == cell_tokens(cell)


def test_every_token_belongs_to_the_cell_of_its_centre():
    owners = {token: cell for cell in range(CELLS) for token in cell_tokens(cell)}
    assert sorted(owners) == list(range(TOKENS_PER_SIDE**2))
    size = IMAGE_SIZE / TOKENS_PER_SIDE
    for token, cell in owners.items():
        row, column = divmod(token, TOKENS_PER_SIDE)
        assert (
            int((row + 0.5) * size // (IMAGE_SIZE / 3)),
            int((column + 0.5) * size // (IMAGE_SIZE / 3)),
        ) == (divmod(cell, 3))


def test_held_out_pairs_and_backgrounds_never_occur_in_training():
    for number in range(400):
        scene = draw_scene(scene_generator("train", 0, number), "train")
        assert not any(is_held_out(one.name, one.cell) for one in scene.objects)
        assert scene.background not in HELD_OUT_BACKGROUNDS


@pytest.mark.parametrize("split", ["calibration", "held_out"])
def test_other_scenes_have_a_held_out_pair_on_a_held_out_background(split):
    for number in range(100):
        scene = draw_scene(scene_generator(split, 0, number), split)
        assert any(is_held_out(one.name, one.cell) for one in scene.objects)
        assert scene.background in HELD_OUT_BACKGROUNDS


def test_about_a_tenth_of_the_pairs_is_held_out_and_no_name_and_no_cell_entirely():
    held_out = np.array([[is_held_out(name, cell) for cell in range(CELLS)] for name in NAMES])
    assert 0.07 < held_out.mean() < 0.13
    assert not held_out.all(axis=0).any()
    assert not held_out.all(axis=1).any()
    assert held_out.any(axis=0).all()


def test_scenes_have_three_to_eight_objects_in_different_cells():
    counts = set()
    for number in range(200):
        objects = draw_scene(scene_generator("train", 0, number), "train").objects
        cells = [one.cell for one in objects]
        assert cells == sorted(set(cells))
        counts.add(len(objects))
    assert counts == set(range(3, 9))


def test_the_same_seed_gives_the_same_picture_and_another_seed_another():
    assets = drawn_assets()

    def picture(seed: int) -> np.ndarray:
        rng = scene_generator("train", seed, 5)
        return np.asarray(render_scene(draw_scene(rng, "train"), assets, rng))

    first = picture(0)
    assert first.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert np.array_equal(first, picture(0))
    assert not np.array_equal(first, picture(1))


def test_objects_are_drawn_in_their_cells():
    """Against the same scene without the object, only pixels in and near its cell differ."""
    assets = drawn_assets()
    rng = scene_generator("train", 0, 1)
    scene = draw_scene(rng, "train")
    state = rng.bit_generator.state
    with_objects = np.asarray(render_scene(scene, assets, rng)).astype(int)
    rng.bit_generator.state = state
    without = np.asarray(render_scene(type(scene)((), scene.background, "train"), assets, rng)).astype(int)
    changed = np.abs(with_objects - without).max(axis=2) > 0
    side = IMAGE_SIZE / 3
    occupied = {one.cell for one in scene.objects}
    for cell in range(CELLS):
        row, column = divmod(cell, 3)
        inner = changed[
            int(row * side + 30) : int((row + 1) * side - 30),
            int(column * side + 30) : int((column + 1) * side - 30),
        ]
        assert (inner.mean() > 0.5) == (cell in occupied)


def test_the_stand_in_covers_all_names_and_backgrounds_with_different_pictures():
    assets = drawn_assets()
    assert assets.source == "drawn"
    assert set(assets.objects) == set(NAMES)
    assert set(assets.backgrounds) == set(BACKGROUNDS)
    pictures = {np.asarray(stamp).tobytes() for (stamp,) in assets.objects.values()}
    assert len(pictures) == len(NAMES)


def test_missing_photographs_say_what_to_run(tmp_path: Path):
    with pytest.raises(InputError, match=re.escape("build_photo_backbone --photographs-only")):
        load_photographs(tmp_path)


def test_the_data_set_asks_every_learnt_type_about_scenes_that_training_never_showed():
    data = PhotoData(7, assets=drawn_assets())
    entries = choose_samples(data, 30, 30, seed=7)
    samples = [data.load(entry) for entry in entries]
    assert {sample.question_type for sample in samples} == set(LEARNT_TYPES)
    assert len({sample.id for sample in samples}) == 60
    calibration, held_out = entries[0], entries[30]
    assert (calibration.use, held_out.use) == ("calibration", "held_out")
    assert not np.array_equal(
        np.asarray(data.load(calibration).images[0]), np.asarray(data.load(held_out).images[0])
    )
    for sample, entry in zip(samples, entries, strict=True):
        rng = scene_generator(entry.use, 7, entry.row)
        grid = grid_of(draw_scene(rng, entry.use))
        assert sample.answer == answer_from_grid(grid, sample.question)


def test_a_sample_does_not_depend_on_those_before_it():
    data, again = PhotoData(0, assets=drawn_assets()), PhotoData(0, assets=drawn_assets())
    entries = data.entries(3, 0)
    first = [data.load(entry) for entry in entries]
    second = [again.load(entry) for entry in reversed(entries)][::-1]
    for one, other in zip(first, second, strict=True):
        assert (one.question, one.answer) == (other.question, other.answer)
        assert np.array_equal(np.asarray(one.images[0]), np.asarray(other.images[0]))
