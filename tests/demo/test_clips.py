"""The clips of the video demo: every answer is right, frames show the clip, samples are reproducible."""

from __future__ import annotations

import re

import numpy as np
import pytest

from schedule_finder.demo.clips import (
    CLIP_TYPES,
    FRAMES,
    GRID,
    Clip,
    ClipObject,
    clip_samples,
    clip_with_question,
    draw_clip,
)
from schedule_finder.demo.draws import scene_rng
from schedule_finder.demo.scenes import COLOUR_NAMES, COLOURS, HELD_OUT_COMBINATIONS
from schedule_finder.samples import choose_samples, open_data

SPLITS = ("train", "calibration", "held_out")


def called(objects: list[ClipObject], name: str) -> list[ClipObject]:
    """The objects that a name of one or two words fits."""
    words = set(name.split()) - {"object"}
    return [one for one in objects if words <= {one.attribute("colour"), one.attribute("shape")}]


def token(one: ClipObject, frame: int) -> int:
    return 9 * frame + 3 * one.row + one.column


def tokens(*objects: ClipObject) -> tuple[int, ...]:
    return tuple(token(one, frame) for one in objects for frame in range(one.start, one.stop))


def solve(clip: Clip, question: str) -> tuple[str, tuple[int, ...]]:
    """Answers from the words of the question alone, and names the vision tokens that had to be looked at."""
    everything = list(clip.objects)
    if match := re.fullmatch(r"in frame(\d) (.+)\?", question):
        frame = int(match[1]) - 1
        shown = [one for one in everything if one.start <= frame < one.stop]
        return solve_frame(shown, frame, match[2])
    if match := re.fullmatch(r"what (colour|shape) is the (.+)\?", question):
        (one,) = called(everything, match[2])
        return one.attribute(match[1]), tokens(one)
    if match := re.fullmatch(r"which (row|column) has the (.+)\?", question):
        (one,) = called(everything, match[2])
        return f"{match[1]}{getattr(one, match[1]) + 1}", tokens(one)
    if match := re.fullmatch(r"which frame is first with the (.+)\?", question):
        (one,) = called(everything, match[1])
        return f"frame{one.start + 1}", (token(one, one.start),)
    if match := re.fullmatch(r"which is first the (.+) or the (.+)\?", question):
        (one,), (other,) = called(everything, match[1]), called(everything, match[2])
        first, second = sorted((one, other), key=lambda some: some.start)
        assert first.start < second.start
        named_by = "colour" if "object" in match[1] else "shape"
        return first.attribute(named_by), tokens(first, second)
    if match := re.fullmatch(r"how many frames have the (.+)\?", question):
        (one,) = called(everything, match[1])
        return str(one.stop - one.start), tokens(one)
    raise AssertionError(f"no rule for {question!r}")


def solve_frame(shown: list[ClipObject], frame: int, question: str) -> tuple[str, tuple[int, ...]]:
    if match := re.fullmatch(r"what (colour|shape) is the (.+)", question):
        (one,) = called(shown, match[2])
        return one.attribute(match[1]), (token(one, frame),)
    if match := re.fullmatch(r"is there an? (.+)", question):
        found = called(shown, match[1])
        return ("yes" if found else "no"), tuple(token(one, frame) for one in found)
    assert question == "how many objects are there"
    return str(len(shown)), ()


@pytest.mark.parametrize("split", SPLITS)
def test_answers_and_regions_follow_from_the_clip(split: str) -> None:
    seen = set()
    for sample in clip_samples(200, split=split, seed=3):
        number = int(sample.id.rsplit("-", 1)[1])
        clip, _, _ = clip_with_question(number, sample.question_type, split=split, seed=3)
        assert (sample.answer, sample.regions) == solve(clip, sample.question), sample.question
        seen.add(sample.question_type)
    assert seen == set(CLIP_TYPES)


def test_no_cell_shows_two_objects() -> None:
    for number in range(100):
        clip = draw_clip(scene_rng("train", 0, number), "train")
        shown = [place for one in clip.objects for place in tokens(one)]
        assert len(shown) == len(set(shown))
        assert all(0 <= one.start < one.stop <= FRAMES for one in clip.objects)


def test_frames_show_the_clip() -> None:
    """The pixels of each cell say which colour is there, or that nothing is; without objects only noise changes."""
    palette = np.array(list(COLOURS.values()), dtype=float)
    for sample in clip_samples(10, split="held_out"):
        number = int(sample.id.rsplit("-", 1)[1])
        clip, _, _ = clip_with_question(number, sample.question_type, split="held_out", seed=0)
        frames = np.stack([np.asarray(frame, dtype=float) for frame in sample.frames])
        assert frames.shape == (8, 72, 72, 3)
        colours = {place: one.colour for one in clip.objects for place in tokens(one)}
        for place in range(FRAMES * GRID**2):
            frame, row, column = place // 9, place % 9 // 3, place % 3
            cell = frames[frame, 24 * row : 24 * row + 24, 24 * column : 24 * column + 24]
            bright = cell.max(axis=-1) > 140  # any background is darker than any object
            assert bright.any() == (place in colours)
            if place in colours:
                nearest = int(np.abs(palette - np.median(cell[bright], axis=0)).sum(axis=1).argmin())
                assert nearest == colours[place], COLOUR_NAMES[colours[place]]
        shown = np.zeros((FRAMES, 3, 3), dtype=bool)
        shown.reshape(-1)[list(colours)] = True
        free = ~(shown[:-1] | shown[1:]).repeat(24, axis=1).repeat(24, axis=2)
        assert np.abs(frames[1:] - frames[:-1])[free].max() < 50  # noise of up to 5, twice


def test_samples_are_reproducible_and_splits_differ() -> None:
    marks = {}
    for split in SPLITS:
        first, again = (list(clip_samples(20, split=split, seed=5)) for _ in range(2))
        assert [one.question for one in first] == [one.question for one in again]
        assert all(a.frames[3].tobytes() == b.frames[3].tobytes() for a, b in zip(first, again, strict=True))
        marks[split] = {one.frames[0].tobytes() for one in first} | {one.id for one in first}
    assert not marks["train"] & marks["held_out"]
    assert not marks["calibration"] & marks["held_out"]
    some = list(clip_samples(4, split="held_out", question_types=["order", "duration"]))
    every = {one.id: one.question for one in clip_samples(20, split="held_out")}
    assert all(every[one.id] == one.question for one in some)


def test_a_known_sample_never_changes() -> None:
    (sample,) = clip_samples(1, split="calibration")
    assert (sample.id, sample.question, sample.answer, sample.regions) == (
        "video-calibration-0-000000",
        "what colour is the ring?",
        "orange",
        (38, 47, 56),
    )


def test_training_shows_no_held_out_combination_and_the_others_do() -> None:
    for split, expected in (("train", False), ("calibration", True), ("held_out", True)):
        for number in range(50):
            clip = draw_clip(scene_rng(split, 0, number), split)  # type: ignore[arg-type]
            shown = HELD_OUT_COMBINATIONS.intersection(one.combination for one in clip.objects)
            assert bool(shown) == expected


def test_wrong_types_are_refused() -> None:
    with pytest.raises(ValueError, match="'colours' is not one of"):
        next(clip_samples(1, split="train", question_types=["colours"]))
    with pytest.raises(ValueError, match="at least one type"):
        next(clip_samples(1, split="train", question_types=[]))


def test_the_data_set_gives_videos() -> None:
    data = open_data(["demo-video"], seed=2)
    entries = choose_samples(data, 3, 2, 2)
    assert [entry.id for entry in entries[:2]] == ["video-calibration-2-000000", "video-calibration-2-000001"]
    samples = [data.load(entry) for entry in entries]
    assert [one.id for one in samples] == [entry.id for entry in entries]
    assert all(not one.images and len(one.videos[0]) == 8 for one in samples)
    # In a mixture with the pictures, no two samples have one id.
    mixed = choose_samples(open_data(["demo", "demo-video"]), 4, 2, 0)
    assert len({entry.id for entry in mixed}) == 6
