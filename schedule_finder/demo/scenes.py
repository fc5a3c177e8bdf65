"""The embedded demo data set: small drawn scenes and questions about them.

A scene is a 96 x 96 picture of an 8 x 8 grid. Each of its 6 to 13 objects (8 colours x 8 shapes) lies
inside one cell, and one cell is one vision token of the demo backbone. The vision tokens that an answer depends on are
therefore known exactly: one cell, two cells, or the whole picture.

A sample depends on the split, the seed and its number only. Eight (colour, shape) combinations never occur in training
scenes; every calibration and held-out scene contains at least one of them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from schedule_finder.demo.drawing import COLOURS, draw_objects
from schedule_finder.demo.draws import Split, pick, scene_rng

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

GRID = 8  # cells per side
CELL = 12  # pixels per side of a cell, and of a patch of the demo backbone
IMAGE_SIZE = GRID * CELL  # pixels per side
OBJECT_COUNT = (6, 13)  # fewest and most objects of a scene
MAX_COUNT = 6  # the largest number that is ever the answer to a counting question

COLOUR_NAMES = tuple(COLOURS)
SHAPE_NAMES = ("circle", "ring", "square", "diamond", "triangle", "cross", "star", "heart")
ROW_NAMES = tuple(f"row{number}" for number in range(1, GRID + 1))
COLUMN_NAMES = tuple(f"column{number}" for number in range(1, GRID + 1))
COUNT_NAMES = tuple(str(number) for number in range(MAX_COUNT + 1))

Combination = tuple[int, int]
"""Indices into `COLOUR_NAMES` and `SHAPE_NAMES`."""

# One per colour and one per shape, so that every word keeps seven of its eight combinations in training.
HELD_OUT_COMBINATIONS: frozenset[Combination] = frozenset(
    (colour, (3 * colour + 1) % len(SHAPE_NAMES)) for colour in range(len(COLOUR_NAMES))
)
QUESTION_TYPES: tuple[str, ...] = (
    "colour",
    "shape",
    "at",
    "where",
    "relation_colour",
    "relation_shape",
    "count_colour",
    "count_shape",
    "exists",
)
PRACTICE_TYPES: tuple[str, ...] = ("shifted_at", "shifted_where")
"""Asked in training only: the two halves of a relation, which is not learnt without them."""

# (row step, column step) to the cell that lies in the named direction of an object
_DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
_NEIGHBOUR_SHARE = 0.5  # of the objects are put next to an earlier one, so that relations can be asked
_SCENES_PER_QUESTION = 1000  # draws before a question type counts as impossible


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object: its cell (0-based, row 0 on top) and indices into the colour and shape names."""

    row: int
    column: int
    colour: int
    shape: int

    @property
    def region(self) -> int:
        """Index of the vision token that shows the object (row-major)."""
        return self.row * GRID + self.column

    @property
    def combination(self) -> Combination:
        """Colour and shape."""
        return self.colour, self.shape


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects in different cells; the split decides which combinations may occur and be asked about."""

    objects: tuple[SceneObject, ...]
    split: Split


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a scene. `regions`: vision tokens the answer needs, empty for the whole image."""

    text: str
    answer: str
    question_type: str
    regions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DemoSample:
    """One image (RGB), one question and its answer of one word.

    `regions` holds the indices (row-major) of the vision tokens the answer needs; it is empty for questions
    about the whole image.
    """

    id: str
    image: Image.Image
    question: str
    answer: str
    question_type: str
    regions: tuple[int, ...]


def demo_samples(
    count: int,
    *,
    split: Split,
    seed: int = 0,
    question_types: Sequence[str] | None = None,
) -> Iterator[DemoSample]:
    """Yields `count` samples, the question types in turn.

    A sample is a function of the split, the seed and the number in its id alone: asking for some question
    types yields exactly those samples of the full sequence.
    """
    chosen = QUESTION_TYPES if question_types is None else tuple(question_types)
    for question_type in chosen:
        if question_type not in QUESTION_TYPES:
            raise ValueError(f"question_types: {question_type!r} is not one of {QUESTION_TYPES}")
    if not chosen:
        raise ValueError("question_types: must name at least one type")
    for index in range(count):
        turn, position = divmod(index, len(chosen))
        question_type = chosen[position]
        number = turn * len(QUESTION_TYPES) + QUESTION_TYPES.index(question_type)
        scene, question, rng = scene_with_question(number, question_type, split=split, seed=seed)
        yield DemoSample(
            id=f"{split}-{seed}-{number:06d}",
            image=Image.fromarray(render_scene(scene, rng)),
            question=question.text,
            answer=question.answer,
            question_type=question_type,
            regions=question.regions,
        )


def scene_with_question(
    number: int, question_type: str, *, split: Split, seed: int
) -> tuple[Scene, Question, np.random.Generator]:
    """The scene and question of sample `number`, and the generator that goes on to draw its picture."""
    rng = scene_rng(split, seed, number)
    for _ in range(_SCENES_PER_QUESTION):
        scene = draw_scene(rng, split)
        question = ask(scene, question_type, rng)
        if question is not None:
            return scene, question, rng
    raise RuntimeError(f"no scene for {question_type!r} in {_SCENES_PER_QUESTION} draws")


def draw_scene(rng: np.random.Generator, split: Split, object_count: tuple[int, int] = OBJECT_COUNT) -> Scene:
    """Places objects; `object_count` is the fewest and the most of them."""
    count = int(rng.integers(object_count[0], object_count[1] + 1))
    combinations = draw_combinations(rng, split, count)
    objects = tuple(
        SceneObject(row, column, colour, shape)
        for (row, column), (colour, shape) in zip(_draw_cells(rng, count), combinations, strict=True)
    )
    return Scene(objects, split)


def draw_combinations(rng: np.random.Generator, split: Split, count: int) -> list[Combination]:
    """Colours and shapes of `count` objects that the split allows."""
    # Uneven palettes: some colours and shapes repeat (something to count), others occur once (a name).
    weights = np.outer(rng.dirichlet(np.ones(len(COLOURS))), rng.dirichlet(np.ones(len(SHAPE_NAMES))))
    if split == "train":
        for combination in HELD_OUT_COMBINATIONS:
            weights[combination] = 0.0
    drawn = rng.choice(weights.size, size=count, p=weights.ravel() / weights.sum())
    combinations = [divmod(int(index), len(SHAPE_NAMES)) for index in drawn]
    if split != "train" and not HELD_OUT_COMBINATIONS.intersection(combinations):
        held_out = sorted(HELD_OUT_COMBINATIONS)
        combinations[int(rng.integers(count))] = held_out[int(rng.integers(len(held_out)))]
    return combinations


def _draw_cells(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """`count` different cells, many of them neighbours."""
    taken: list[tuple[int, int]] = []
    while len(taken) < count:
        if taken and rng.random() < _NEIGHBOUR_SHARE:
            row, column = taken[int(rng.integers(len(taken)))]
            row_step, column_step = list(_DIRECTIONS.values())[int(rng.integers(len(_DIRECTIONS)))]
            cell = row + row_step, column + column_step
        else:
            row, column = rng.integers(GRID, size=2)
            cell = int(row), int(column)
        if cell not in taken and 0 <= cell[0] < GRID and 0 <= cell[1] < GRID:
            taken.append(cell)
    return taken


def ask(scene: Scene, question_type: str, rng: np.random.Generator) -> Question | None:
    """A question of the given type, or None where the scene allows none."""
    asked = _ASKERS[question_type](scene, question_type, rng)
    if asked is None:
        return None
    text, answer, regions = asked
    return Question(text, answer, question_type, regions)


_Asked = tuple[str, str, tuple[int, ...]] | None
"""Text, answer, regions."""


def _ask_attribute(scene: Scene, question_type: str, rng: np.random.Generator) -> _Asked:
    """One region, named by its shape (asks for the colour) or by its colour (asks for the shape)."""
    named_by = "shape" if question_type == "colour" else "colour"
    candidates = _unique_objects(scene, named_by)
    if not candidates:
        return None
    target = pick(rng, candidates)
    return (
        f"what {question_type} is the {_name(target, named_by)}?",
        _attribute(target, question_type),
        (target.region,),
    )


def _ask_at(scene: Scene, _: str, rng: np.random.Generator) -> _Asked:
    """One region, named by its position."""
    target = pick(rng, scene.objects)
    asked_for = pick(rng, ("colour", "shape"))
    place = f"{ROW_NAMES[target.row]} {COLUMN_NAMES[target.column]}"
    return f"what {asked_for} is at {place}?", _attribute(target, asked_for), (target.region,)


def _ask_where(scene: Scene, _: str, rng: np.random.Generator) -> _Asked:
    """One region, named by what it shows; the answer is its row or its column."""
    named = _draw_named_object(scene, rng)
    if named is None:
        return None
    target, name = named
    axis, answer = pick(rng, (("row", ROW_NAMES[target.row]), ("column", COLUMN_NAMES[target.column])))
    return f"which {axis} has the {name}?", answer, (target.region,)


def _ask_relation(scene: Scene, question_type: str, rng: np.random.Generator) -> _Asked:
    """Two regions: an object that is named, and its direct neighbour, which is asked for."""
    named = _draw_named_object(scene, rng)
    if named is None:
        return None
    anchor, name = named
    by_cell = {(other.row, other.column): other for other in scene.objects}
    neighbours = [
        (words, by_cell[cell])
        for words, (row_step, column_step) in _DIRECTIONS.items()
        if (cell := (anchor.row + row_step, anchor.column + column_step)) in by_cell
    ]
    if not neighbours:
        return None
    words, target = pick(rng, neighbours)
    asked_for = question_type.removeprefix("relation_")
    return (
        f"what {asked_for} is {words} the {name}?",
        _attribute(target, asked_for),
        (anchor.region, target.region),
    )


def _ask_shifted_at(scene: Scene, _: str, rng: np.random.Generator) -> _Asked:
    """The second half of a relation: the neighbour of a cell that is named by its position."""
    target = pick(rng, scene.objects)
    words, (row_step, column_step) = pick(rng, tuple(_DIRECTIONS.items()))
    row, column = target.row - row_step, target.column - column_step
    if not (0 <= row < GRID and 0 <= column < GRID):
        return None
    asked_for = pick(rng, ("colour", "shape"))
    return (
        f"what {asked_for} is {words} {ROW_NAMES[row]} {COLUMN_NAMES[column]}?",
        _attribute(target, asked_for),
        (target.region,),
    )


def _ask_shifted_where(scene: Scene, _: str, rng: np.random.Generator) -> _Asked:
    """The first half of a relation: where the neighbour of a named object is, or would be."""
    named = _draw_named_object(scene, rng)
    if named is None:
        return None
    anchor, name = named
    words, (row_step, column_step) = pick(rng, tuple(_DIRECTIONS.items()))
    row, column = anchor.row + row_step, anchor.column + column_step
    if not (0 <= row < GRID and 0 <= column < GRID):
        return None
    axis, answer = pick(rng, (("row", ROW_NAMES[row]), ("column", COLUMN_NAMES[column])))
    return f"which {axis} is {words} the {name}?", answer, (anchor.region,)


def _ask_count(scene: Scene, question_type: str, rng: np.random.Generator) -> _Asked:
    """The whole image: how many objects share an attribute."""
    attribute = question_type.removeprefix("count_")
    names = COLOUR_NAMES if attribute == "colour" else SHAPE_NAMES
    counts = Counter(_attribute(one, attribute) for one in scene.objects)
    by_count: dict[int, list[str]] = {}
    for name in names:
        if counts[name] <= MAX_COUNT:
            by_count.setdefault(counts[name], []).append(name)
    # The number is drawn first, then an attribute that occurs so often: small numbers would dominate else.
    count = pick(rng, sorted(by_count))
    name = pick(rng, by_count[count])
    ending = f"{name} shaped" if attribute == "shape" else name
    return f"how many objects are {ending}?", COUNT_NAMES[count], ()


def _ask_exists(scene: Scene, _: str, rng: np.random.Generator) -> _Asked:
    """The whole image: is there an object with this colour and this shape.

    Where the answer is no, the colour and the shape both occur, on different objects, if possible. Training
    never asks about held-out combinations: the answer would always be no, and be learnt by heart.
    """
    present = {one.combination for one in scene.objects}
    if rng.random() < 0.5:
        combination, answer = pick(rng, sorted(present)), "yes"
    else:
        absent = set(itertools.product(range(len(COLOURS)), range(len(SHAPE_NAMES)))) - present
        if scene.split == "train":
            absent -= HELD_OUT_COMBINATIONS
        colours = {colour for colour, _ in present}
        shapes = {shape for _, shape in present}
        hard = {(colour, shape) for colour, shape in absent if colour in colours and shape in shapes}
        combination, answer = pick(rng, sorted(hard or absent)), "no"
    colour, shape = combination
    article = "an" if COLOUR_NAMES[colour][0] in "aeiou" else "a"
    return f"is there {article} {COLOUR_NAMES[colour]} {SHAPE_NAMES[shape]}?", answer, ()


_ASKERS: dict[str, Callable[[Scene, str, np.random.Generator], _Asked]] = {
    "colour": _ask_attribute,
    "shape": _ask_attribute,
    "at": _ask_at,
    "where": _ask_where,
    "relation_colour": _ask_relation,
    "relation_shape": _ask_relation,
    "count_colour": _ask_count,
    "count_shape": _ask_count,
    "exists": _ask_exists,
    "shifted_at": _ask_shifted_at,
    "shifted_where": _ask_shifted_where,
}


def _attribute(one: SceneObject, attribute: str) -> str:
    return COLOUR_NAMES[one.colour] if attribute == "colour" else SHAPE_NAMES[one.shape]


def _name(one: SceneObject, named_by: str) -> str:
    """What to call an object: "star", "red object" or "red star"."""
    colour = "" if named_by == "shape" else COLOUR_NAMES[one.colour] + " "
    return colour + ("object" if named_by == "colour" else SHAPE_NAMES[one.shape])


def _unique_objects(scene: Scene, named_by: str) -> list[SceneObject]:
    """Objects that this kind of name fits alone."""
    counts = Counter(_name(one, named_by) for one in scene.objects)
    return [one for one in scene.objects if counts[_name(one, named_by)] == 1]


def _draw_named_object(scene: Scene, rng: np.random.Generator) -> tuple[SceneObject, str] | None:
    """An object with a name that fits it alone."""
    named_by = pick(rng, ("shape", "colour", "combination"))
    candidates = _unique_objects(scene, named_by)
    if not candidates:
        return None
    target = pick(rng, candidates)
    return target, _name(target, named_by)


def render_scene(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draws the picture: uint8 of shape (IMAGE_SIZE, IMAGE_SIZE, 3)."""
    colours = list(COLOURS.values())
    objects = [(colours[one.colour], SHAPE_NAMES[one.shape], one.row, one.column) for one in scene.objects]
    return draw_objects(objects, GRID, CELL, rng)
