"""The demo data set: every answer is right, splits do not leak, samples are reproducible."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest

from schedule_finder.demo.draws import scene_rng
from schedule_finder.demo.scenes import (
    COLOUR_NAMES,
    COLOURS,
    HELD_OUT_COMBINATIONS,
    QUESTION_TYPES,
    SHAPE_NAMES,
    Scene,
    SceneObject,
    demo_samples,
    draw_scene,
    scene_with_question,
)

if TYPE_CHECKING:
    from schedule_finder.demo import scenes

SPLITS = ("train", "calibration", "held_out")
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


def objects_called(scene: Scene, name: str) -> list[SceneObject]:
    words = set(name.split()) - {"object"}
    return [one for one in scene.objects if words <= {COLOUR_NAMES[one.colour], SHAPE_NAMES[one.shape]}]


def the_object_called(scene: Scene, name: str) -> SceneObject:
    (one,) = objects_called(scene, name)
    return one


def attribute(one: SceneObject, asked_for: str) -> str:
    return {"colour": COLOUR_NAMES[one.colour], "shape": SHAPE_NAMES[one.shape]}[asked_for]


def solve(scene: Scene, question: str) -> tuple[str, tuple[int, ...]]:
    """Answers from the words of the question alone, and names the regions that had to be looked at."""
    if match := re.fullmatch(r"what (colour|shape) is the (.+)\?", question):
        one = the_object_called(scene, match[2])
        return attribute(one, match[1]), (8 * one.row + one.column,)
    if match := re.fullmatch(r"what (colour|shape) is at row(\d) column(\d)\?", question):
        row, column = int(match[2]) - 1, int(match[3]) - 1
        (one,) = [one for one in scene.objects if (one.row, one.column) == (row, column)]
        return attribute(one, match[1]), (8 * row + column,)
    if match := re.fullmatch(r"which (row|column) has the (.+)\?", question):
        one = the_object_called(scene, match[2])
        return f"{match[1]}{getattr(one, match[1]) + 1}", (8 * one.row + one.column,)
    if match := re.fullmatch(r"what (colour|shape) is (left of|right of|above|below) the (.+)\?", question):
        anchor = the_object_called(scene, match[3])
        row, column = anchor.row + STEPS[match[2]][0], anchor.column + STEPS[match[2]][1]
        (one,) = [one for one in scene.objects if (one.row, one.column) == (row, column)]
        return attribute(one, match[1]), (8 * anchor.row + anchor.column, 8 * row + column)
    if match := re.fullmatch(r"how many objects are (\w+)( shaped)?\?", question):
        return str(len(objects_called(scene, match[1]))), ()
    if match := re.fullmatch(r"is there an? (\w+ \w+)\?", question):
        return ("yes" if objects_called(scene, match[1]) else "no"), ()
    raise AssertionError(f"no rule for {question!r}")


@pytest.mark.parametrize("split", SPLITS)
def test_answers_and_regions_follow_from_the_scene(split):
    samples = list(demo_samples(450, split=split, seed=3))
    for sample in samples:
        number = int(sample.id.rsplit("-", 1)[1])
        scene, _, _ = scene_with_question(number, sample.question_type, split=split, seed=3)
        assert (sample.answer, sample.regions) == solve(scene, sample.question), sample.question


def test_pictures_show_the_scene():
    """The pixels in the middle of each cell say which colour is there, or that nothing is."""
    palette = np.array(list(COLOURS.values()), dtype=float)
    for sample in demo_samples(90, split="held_out"):
        number = int(sample.id.rsplit("-", 1)[1])
        scene, _, _ = scene_with_question(number, sample.question_type, split="held_out", seed=0)
        picture = np.asarray(sample.image, dtype=float)
        assert picture.shape == (96, 96, 3)
        by_cell = {(one.row, one.column): one for one in scene.objects}
        assert len(by_cell) == len(scene.objects)
        for row in range(8):
            for column in range(8):
                cell = picture[12 * row : 12 * row + 12, 12 * column : 12 * column + 12]
                # Any background is darker than any object: at most 80 + noise against 160 and more.
                brightest = cell.max(axis=-1) > 140
                one = by_cell.get((row, column))
                assert brightest.any() == (one is not None)
                if one is not None:
                    shown = np.median(cell[brightest], axis=0)
                    nearest = int(np.abs(palette - shown).sum(axis=1).argmin())
                    assert nearest == one.colour, (COLOUR_NAMES[one.colour], shown)


def test_samples_are_reproducible():
    first = list(demo_samples(60, split="calibration", seed=5))
    again = list(demo_samples(60, split="calibration", seed=5))
    assert [fields(sample) for sample in first] == [fields(sample) for sample in again]
    other = list(demo_samples(60, split="calibration", seed=6))
    assert not {pixels(sample) for sample in first} & {pixels(sample) for sample in other}


def test_a_known_sample_never_changes():
    """Ids in published results name samples; this fails if the generator draws anything differently."""
    (sample,) = demo_samples(1, split="held_out", seed=0)
    assert (sample.id, sample.question, sample.answer, sample.regions) == (
        "held_out-0-000000",
        "what colour is the cross?",
        "cyan",
        (19,),
    )


def fields(sample: scenes.DemoSample) -> tuple:
    return sample.id, sample.question, sample.answer, sample.regions, pixels(sample)


def pixels(sample: scenes.DemoSample) -> bytes:
    return sample.image.tobytes()


def test_splits_share_no_picture_and_no_id():
    seen: set[bytes | str] = set()
    for split in SPLITS:
        for seed in (0, 1):
            for sample in demo_samples(100, split=split, seed=seed):
                for mark in (sample.id, pixels(sample)):
                    assert mark not in seen
                    seen.add(mark)


def test_training_never_shows_or_names_held_out_combinations():
    named = 0
    for sample in demo_samples(900, split="train"):
        number = int(sample.id.rsplit("-", 1)[1])
        scene, _, _ = scene_with_question(number, sample.question_type, split="train", seed=0)
        assert not HELD_OUT_COMBINATIONS & {one.combination for one in scene.objects}
        for colour, shape in HELD_OUT_COMBINATIONS:
            assert f"{COLOUR_NAMES[colour]} {SHAPE_NAMES[shape]}" not in sample.question
        named += sample.question_type in ("exists", "where")
    assert named
    for number in range(2000):
        scene = draw_scene(scene_rng("train", 1, number), "train")
        assert not HELD_OUT_COMBINATIONS & {one.combination for one in scene.objects}


@pytest.mark.parametrize("split", ["calibration", "held_out"])
def test_other_splits_always_show_held_out_combinations(split):
    shown: Counter[tuple[int, int]] = Counter()
    for number in range(400):
        scene = draw_scene(scene_rng(split, 0, number), split)
        present = HELD_OUT_COMBINATIONS & {one.combination for one in scene.objects}
        assert present
        shown.update(present)
    assert set(shown) == HELD_OUT_COMBINATIONS


def test_each_word_keeps_training_combinations():
    assert len(HELD_OUT_COMBINATIONS) == 8
    assert {colour for colour, _ in HELD_OUT_COMBINATIONS} == set(range(len(COLOUR_NAMES)))
    assert {shape for _, shape in HELD_OUT_COMBINATIONS} == set(range(len(SHAPE_NAMES)))


def test_types_take_turns_and_answers_are_spread():
    samples = list(demo_samples(len(QUESTION_TYPES) * 150, split="held_out", seed=1))
    for index, sample in enumerate(samples):
        assert sample.question_type == QUESTION_TYPES[index % len(QUESTION_TYPES)]
    for question_type in QUESTION_TYPES:
        answers = Counter(s.answer for s in samples if s.question_type == question_type)
        most_common = answers.most_common(1)[0][1] / 150
        assert most_common <= (0.65 if question_type == "exists" else 0.36), (question_type, answers)


def test_some_types_are_a_subset_of_all():
    everything = {sample.id: fields(sample) for sample in demo_samples(90, split="held_out")}
    some = list(demo_samples(20, split="held_out", question_types=("where", "colour")))
    assert [sample.question_type for sample in some] == ["where", "colour"] * 10
    assert all(fields(sample) == everything[sample.id] for sample in some)


def test_regions_match_the_kind_of_question():
    wanted = {"relation_colour": 2, "relation_shape": 2, "count_colour": 0, "count_shape": 0, "exists": 0}
    for sample in demo_samples(180, split="calibration"):
        assert len(sample.regions) == wanted.get(sample.question_type, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split: 'test'"),
        ({"split": "train", "seed": -1}, "seed: -1"),
        ({"split": "train", "seed": 2**32}, "seed: 4294967296"),
        ({"split": "train", "question_types": ("color",)}, "question_types: 'color'"),
        ({"split": "train", "question_types": ()}, "question_types: must name"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        next(demo_samples(1, **arguments))
