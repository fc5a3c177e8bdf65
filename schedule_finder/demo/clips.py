"""The demo's scenes as clips: eight small frames, and questions about one frame, about order and about counting.

A frame is a picture of a 3 x 3 grid, and one cell is one vision token of the video demo backbone, so a clip has 72. An
object appears in a frame, stays in its cell, and disappears some frames later; the background never changes. What an
answer depends on is therefore known exactly.

A sample depends on the split, the seed and its number only. The combinations of colour and shape that never occur in
training are those of `schedule_finder.demo.scenes`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from schedule_finder.demo.drawing import COLOURS, draw_frames
from schedule_finder.demo.draws import pick, scene_rng
from schedule_finder.demo.scenes import (
    COLOUR_NAMES,
    COLUMN_NAMES,
    COUNT_NAMES,
    MAX_COUNT,
    ROW_NAMES,
    SHAPE_NAMES,
    Combination,
    Question,
    draw_combinations,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from schedule_finder.demo.draws import Split

FRAMES = 8
GRID = 3  # cells per side of a frame
PATCH = 12  # pixels per side of a patch of the video demo backbone, whose video path averages 2 x 2 patches
CELL = 2 * PATCH
FRAME_SIZE = GRID * CELL  # pixels per side
FRAME_TOKENS = GRID**2
OBJECT_COUNT = (5, 9)  # fewest and most objects of a clip
_DURATIONS = (0.3, 0.25, 0.2, 0.15, 0.06, 0.04)  # probabilities of 1, 2, ... frames
_CLIPS_PER_QUESTION = 1000  # draws before a question type counts as impossible

FRAME_NAMES = tuple(f"frame{number}" for number in range(1, FRAMES + 1))
CLIP_TYPES: tuple[str, ...] = (
    "colour",
    "shape",
    "where",
    "frame_colour",
    "frame_shape",
    "frame_exists",
    "frame_count",
    "first_frame",
    "order",
    "duration",
)


@dataclass(frozen=True, slots=True)
class ClipObject:
    """One object: its cell, indices into the colour and shape names, its first frame and the first one without it."""

    row: int
    column: int
    colour: int
    shape: int
    start: int
    stop: int

    @property
    def combination(self) -> Combination:
        """Colour and shape."""
        return self.colour, self.shape

    @property
    def regions(self) -> tuple[int, ...]:
        """Indices of the vision tokens that show the object."""
        return tuple(self.region(frame) for frame in range(self.start, self.stop))

    def region(self, frame: int) -> int:
        """Index of the vision token that shows the object in a frame."""
        return frame * FRAME_TOKENS + self.row * GRID + self.column

    def called(self, named_by: str) -> str:
        """Its name: "star", "red object" or "red star"."""
        colour = "" if named_by == "shape" else COLOUR_NAMES[self.colour] + " "
        return colour + ("object" if named_by == "colour" else SHAPE_NAMES[self.shape])

    def attribute(self, asked_for: str) -> str:
        """The word for its colour or its shape."""
        return COLOUR_NAMES[self.colour] if asked_for == "colour" else SHAPE_NAMES[self.shape]


@dataclass(frozen=True, slots=True)
class Clip:
    """Objects of which no two are in one cell at a time."""

    objects: tuple[ClipObject, ...]

    def shown(self, frame: int) -> list[ClipObject]:
        """The objects of a frame."""
        return [one for one in self.objects if one.start <= frame < one.stop]


@dataclass(frozen=True, slots=True)
class ClipSample:
    """One clip (RGB frames), one question and its answer of one word.

    `regions` holds the indices (frame by frame, row-major) of the vision tokens that the answer needs; it is empty for
    questions that need all of a clip or of a frame.
    """

    id: str
    frames: tuple[Image.Image, ...]
    question: str
    answer: str
    question_type: str
    regions: tuple[int, ...]


def clip_samples(
    count: int, *, split: Split, seed: int = 0, question_types: Sequence[str] = CLIP_TYPES
) -> Iterator[ClipSample]:
    """Yields `count` samples, the question types in turn; as `schedule_finder.demo.demo_samples`."""
    for question_type in question_types:
        if question_type not in CLIP_TYPES:
            raise ValueError(f"question_types: {question_type!r} is not one of {CLIP_TYPES}")
    if not question_types:
        raise ValueError("question_types: must name at least one type")
    for index in range(count):
        turn, position = divmod(index, len(question_types))
        question_type = question_types[position]
        number = turn * len(CLIP_TYPES) + CLIP_TYPES.index(question_type)
        clip, question, rng = clip_with_question(number, question_type, split=split, seed=seed)
        yield ClipSample(
            id=f"video-{split}-{seed}-{number:06d}",
            frames=tuple(map(Image.fromarray, render_clip(clip, rng))),
            question=question.text,
            answer=question.answer,
            question_type=question_type,
            regions=question.regions,
        )


def clip_with_question(
    number: int, question_type: str, *, split: Split, seed: int
) -> tuple[Clip, Question, np.random.Generator]:
    """The clip and question of sample `number`, and the generator that goes on to draw its frames."""
    rng = scene_rng(split, seed, number)
    for _ in range(_CLIPS_PER_QUESTION):
        clip = draw_clip(rng, split)
        question = ask_clip(clip, question_type, rng)
        if question is not None:
            return clip, question, rng
    raise RuntimeError(f"no clip for {question_type!r} in {_CLIPS_PER_QUESTION} draws")


def draw_clip(rng: np.random.Generator, split: Split, object_count: tuple[int, int] = OBJECT_COUNT) -> Clip:
    """Places objects in time and space; `object_count` is the fewest and the most of them."""
    count = int(rng.integers(object_count[0], object_count[1] + 1))
    taken = np.zeros((FRAMES, FRAME_TOKENS), dtype=bool)
    objects: list[ClipObject] = []
    for colour, shape in draw_combinations(rng, split, count):
        start = int(rng.integers(FRAMES))
        stop = min(FRAMES, start + 1 + int(rng.choice(len(_DURATIONS), p=_DURATIONS)))
        free = np.flatnonzero(~taken[start:stop].any(axis=0))  # never empty: no more objects than cells
        cell = int(free[int(rng.integers(len(free)))])
        taken[start:stop, cell] = True
        objects.append(ClipObject(cell // GRID, cell % GRID, colour, shape, start, stop))
    return Clip(tuple(objects))


def render_clip(clip: Clip, rng: np.random.Generator) -> np.ndarray:
    """Draws the frames: uint8 of shape (FRAMES, FRAME_SIZE, FRAME_SIZE, 3)."""
    colours = list(COLOURS.values())
    # An object fills one of the four patches of its cell, in all frames the same.
    corners = rng.integers(2, size=(len(clip.objects), 2))
    objects = [
        (
            (
                colours[one.colour],
                SHAPE_NAMES[one.shape],
                2 * one.row + int(down),
                2 * one.column + int(right),
            ),
            range(one.start, one.stop),
        )
        for one, (down, right) in zip(clip.objects, corners, strict=True)
    ]
    return draw_frames(objects, FRAMES, 2 * GRID, PATCH, rng)


def ask_clip(clip: Clip, question_type: str, rng: np.random.Generator) -> Question | None:
    """A question of the given type, or None where the clip allows none."""
    asked = _ASKERS[question_type](clip, question_type, rng)
    if asked is None:
        return None
    text, answer, regions = asked
    return Question(text, answer, question_type, regions)


_Asked = tuple[str, str, tuple[int, ...]] | None
"""Text, answer, regions."""


def _ask_attribute(clip: Clip, question_type: str, rng: np.random.Generator) -> _Asked:
    """An object of which the clip has one, whenever it is shown."""
    named_by = "shape" if question_type == "colour" else "colour"
    candidates = _unique(clip.objects, named_by)
    if not candidates:
        return None
    target = pick(rng, candidates)
    return (
        f"what {question_type} is the {target.called(named_by)}?",
        target.attribute(question_type),
        target.regions,
    )


def _ask_where(clip: Clip, _: str, rng: np.random.Generator) -> _Asked:
    """The row or the column of an object."""
    named = _named_object(clip.objects, rng)
    if named is None:
        return None
    target, name = named
    axis, answer = pick(rng, (("row", ROW_NAMES[target.row]), ("column", COLUMN_NAMES[target.column])))
    return f"which {axis} has the {name}?", answer, target.regions


def _ask_frame_attribute(clip: Clip, question_type: str, rng: np.random.Generator) -> _Asked:
    """One frame: other frames show other objects with the same name, wherever the clip allows."""
    asked_for = question_type.removeprefix("frame_")
    named_by = "shape" if asked_for == "colour" else "colour"
    candidates = [(frame, one) for frame in range(FRAMES) for one in _unique(clip.shown(frame), named_by)]
    ambiguous = [
        (frame, one)
        for frame, one in candidates
        if any(
            other.called(named_by) == one.called(named_by) and other.combination != one.combination
            for other in clip.objects
        )
    ]
    if not candidates:
        return None
    frame, target = pick(rng, ambiguous or candidates)
    return (
        f"in {FRAME_NAMES[frame]} what {asked_for} is the {target.called(named_by)}?",
        target.attribute(asked_for),
        (target.region(frame),),
    )


def _ask_frame_exists(clip: Clip, _: str, rng: np.random.Generator) -> _Asked:
    """One frame: is an object there that the clip shows at some time."""
    named_by = pick(rng, ("shape", "colour", "combination"))
    one = pick(rng, clip.objects)
    name = one.called(named_by)
    having = {
        frame: [other for other in clip.shown(frame) if other.called(named_by) == name]
        for frame in range(FRAMES)
    }
    answer = pick(rng, ("yes", "no"))
    frames = [frame for frame, some in having.items() if bool(some) == (answer == "yes")]
    if not frames:
        return None
    frame = pick(rng, frames)
    article = "an" if name[0] in "aeiou" else "a"
    regions = tuple(other.region(frame) for other in having[frame])
    return f"in {FRAME_NAMES[frame]} is there {article} {name}?", answer, regions


def _ask_frame_count(clip: Clip, _: str, rng: np.random.Generator) -> _Asked:
    """One frame: how many objects it shows."""
    by_count: dict[int, list[int]] = {}
    for frame in range(FRAMES):
        by_count.setdefault(len(clip.shown(frame)), []).append(frame)
    # The number is drawn first: small numbers would dominate else.
    count = pick(rng, sorted(number for number in by_count if number <= MAX_COUNT))
    frame = pick(rng, by_count[count])
    return f"in {FRAME_NAMES[frame]} how many objects are there?", COUNT_NAMES[count], ()


def _ask_first_frame(clip: Clip, _: str, rng: np.random.Generator) -> _Asked:
    """The frame in which an object appears."""
    named = _named_object(clip.objects, rng)
    if named is None:
        return None
    target, name = named
    return f"which frame is first with the {name}?", FRAME_NAMES[target.start], (target.region(target.start),)


def _ask_order(clip: Clip, _: str, rng: np.random.Generator) -> _Asked:
    """Two objects: which of them appears first."""
    named_by = pick(rng, ("shape", "colour"))
    candidates = _unique(clip.objects, named_by)
    pairs = [(one, other) for one in candidates for other in candidates if one.start < other.start]
    if not pairs:
        return None
    first, second = pick(rng, pairs)
    names = [first.called(named_by), second.called(named_by)]
    if rng.random() < 0.5:
        names.reverse()
    return (
        f"which is first the {names[0]} or the {names[1]}?",
        first.attribute(named_by),
        (*first.regions, *second.regions),
    )


def _ask_duration(clip: Clip, _: str, rng: np.random.Generator) -> _Asked:
    """In how many frames an object is shown."""
    named_by = pick(rng, ("shape", "colour", "combination"))
    by_count: dict[int, list[ClipObject]] = {}
    for one in _unique(clip.objects, named_by):
        by_count.setdefault(one.stop - one.start, []).append(one)
    if not by_count:
        return None
    count = pick(rng, sorted(by_count))
    target = pick(rng, by_count[count])
    return f"how many frames have the {target.called(named_by)}?", COUNT_NAMES[count], target.regions


_ASKERS: dict[str, Callable[[Clip, str, np.random.Generator], _Asked]] = {
    "colour": _ask_attribute,
    "shape": _ask_attribute,
    "where": _ask_where,
    "frame_colour": _ask_frame_attribute,
    "frame_shape": _ask_frame_attribute,
    "frame_exists": _ask_frame_exists,
    "frame_count": _ask_frame_count,
    "first_frame": _ask_first_frame,
    "order": _ask_order,
    "duration": _ask_duration,
}


def _unique(objects: Sequence[ClipObject], named_by: str) -> list[ClipObject]:
    """Objects that this kind of name fits alone."""
    counts = Counter(one.called(named_by) for one in objects)
    return [one for one in objects if counts[one.called(named_by)] == 1]


def _named_object(objects: Sequence[ClipObject], rng: np.random.Generator) -> tuple[ClipObject, str] | None:
    """An object with a name that fits it alone."""
    named_by = pick(rng, ("shape", "colour", "combination"))
    candidates = _unique(objects, named_by)
    if not candidates:
        return None
    target = pick(rng, candidates)
    return target, target.called(named_by)
