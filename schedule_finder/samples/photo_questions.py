"""Questions about photo scenes, each with its only right answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from schedule_finder.samples.photo_assets import NAMES
from schedule_finder.samples.photo_scenes import (
    CELLS,
    CELLS_PER_SIDE,
    POSITIONS,
    PhotoObject,
    PhotoScene,
    cell_tokens,
)

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
ROWS = ("top", "middle", "bottom")
NOTHING = "nothing"
_EMPTY_SHARE = 0.15  # of the questions about a position: an empty cell
_ABSENT_SHARE = 0.5  # of the questions whether an object is there: it is not


@dataclass(frozen=True)
class PhotoQuestion:
    """A question, its answer, its type, and the vision tokens (row-major) of the cells that the answer needs.

    ``regions`` is empty where the answer needs the whole picture.
    """

    text: str
    answer: str
    question_type: str
    regions: tuple[int, ...] = ()


_Asked = tuple[str, str, tuple[int, ...]] | None
"""Text, answer, cells."""


def ask(scene: PhotoScene, question_type: str, rng: np.random.Generator) -> PhotoQuestion | None:
    """A random question of a type, or None where the scene allows none."""
    asked = _ASKERS[question_type](scene, rng)
    if asked is None:
        return None
    text, answer, cells = asked
    return PhotoQuestion(text, answer, question_type, tuple(t for cell in cells for t in cell_tokens(cell)))


def _pick(rng: np.random.Generator, options: list[PhotoObject]) -> PhotoObject:
    return options[int(rng.integers(len(options)))]


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _ask_at(scene: PhotoScene, rng: np.random.Generator) -> _Asked:
    empty = [cell for cell in range(CELLS) if scene.at(cell) is None]
    if rng.random() < _EMPTY_SHARE:
        cell = empty[int(rng.integers(len(empty)))]
        return f"What is at the {POSITIONS[cell]}?", NOTHING, (cell,)
    one = _pick(rng, list(scene.objects))
    return f"What is at the {one.position}?", one.name, (one.cell,)


def _ask_where(scene: PhotoScene, rng: np.random.Generator) -> _Asked:
    unique = scene.unique()
    if not unique:
        return None
    one = _pick(rng, unique)
    return f"Where is the {one.name}?", one.position, (one.cell,)


def _ask_exists(scene: PhotoScene, rng: np.random.Generator) -> _Asked:
    present = scene.counts()
    if rng.random() < _ABSENT_SHARE:
        absent = [name for name in NAMES if name not in present]
        return f"Is there {_with_article(absent[int(rng.integers(len(absent)))])}?", "no", ()
    one = _pick(rng, list(scene.objects))
    return f"Is there {_with_article(one.name)}?", "yes", ()


def _ask_count(scene: PhotoScene, rng: np.random.Generator) -> _Asked:
    """The number is drawn first, then a name that occurs so often: "one" would dominate otherwise."""
    by_number: dict[int, list[str]] = {}
    for name, number in scene.counts().items():
        by_number.setdefault(number, []).append(name)
    number = sorted(by_number)[int(rng.integers(len(by_number)))]
    name = sorted(by_number[number])[int(rng.integers(len(by_number[number])))]
    return f"How many times is there {_with_article(name)}?", NUMBERS[number], ()


def _neighbours(scene: PhotoScene, step: int) -> list[tuple[PhotoObject, PhotoObject]]:
    """Pairs of an object with a unique name and the object ``step`` cells further, in its row or column."""
    pairs = []
    for one in scene.unique():
        other = scene.at(one.cell + step)
        same_row = other is not None and other.cell // CELLS_PER_SIDE == one.cell // CELLS_PER_SIDE
        if other is not None and (same_row or abs(step) == CELLS_PER_SIDE):
            pairs.append((one, other))
    return pairs


def _ask_neighbour(words: str, step: int) -> Callable[[PhotoScene, np.random.Generator], _Asked]:
    def asker(scene: PhotoScene, rng: np.random.Generator) -> _Asked:
        pairs = _neighbours(scene, step)
        if not pairs:
            return None
        one, other = pairs[int(rng.integers(len(pairs)))]
        return f"What is just {words} the {one.name}?", other.name, (one.cell, other.cell)

    return asker


def _ask_total(scene: PhotoScene, rng: np.random.Generator) -> _Asked:
    return "How many objects are there?", NUMBERS[len(scene.objects)], ()


def _ask_row(scene: PhotoScene, rng: np.random.Generator) -> _Asked:
    row = int(rng.integers(CELLS_PER_SIDE))
    cells = tuple(range(row * CELLS_PER_SIDE, (row + 1) * CELLS_PER_SIDE))
    names = [one.name for one in scene.objects if one.cell in cells]
    return f"Describe the {ROWS[row]} row from left to right.", ", ".join(names) or NOTHING, cells


def _ask_list(scene: PhotoScene, rng: np.random.Generator) -> _Asked:
    return "List all objects row by row.", ", ".join(one.name for one in scene.objects), ()


def _ask_two_hop(scene: PhotoScene, rng: np.random.Generator) -> _Asked:
    """The object below the left neighbour of a named object."""
    chains = [
        (one, middle, last)
        for one, middle in _neighbours(scene, -1)
        if (last := scene.at(middle.cell + CELLS_PER_SIDE)) is not None
    ]
    if not chains:
        return None
    one, middle, last = chains[int(rng.integers(len(chains)))]
    text = f"What is just below the object left of the {one.name}?"
    return text, last.name, (one.cell, middle.cell, last.cell)


_ASKERS: dict[str, Callable[[PhotoScene, np.random.Generator], _Asked]] = {
    "at": _ask_at,
    "where": _ask_where,
    "exists": _ask_exists,
    "count": _ask_count,
    "left": _ask_neighbour("left of", -1),
    "below": _ask_neighbour("below", CELLS_PER_SIDE),
    "total": _ask_total,
    "row": _ask_row,
    "list": _ask_list,
    "two_hop": _ask_two_hop,
}
QUESTION_TYPES = tuple(_ASKERS)
"""All types that can be asked."""
LEARNT_TYPES = tuple(kind for kind in QUESTION_TYPES if kind not in ("count", "total", "list"))
"""The types that the photo backbone has learnt, and that the data set `photo` asks."""
