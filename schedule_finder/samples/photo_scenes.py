"""Photo scenes: three to eight photographed objects in a 3 x 3 grid of cells on a photographed background.

A scene depends on nothing but its split, its seed and its number; pictures are rendered from the assets at run
time. Held out from training are a tenth of all pairs of an object and a cell (by a fixed hash) and some of the
backgrounds. Calibration and evaluation scenes have only held-out backgrounds and at least one held-out pair.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from schedule_finder.samples.photo_assets import BACKGROUNDS, HELD_OUT_BACKGROUNDS, NAMES, PhotoAssets

Split = Literal["train", "calibration", "held_out"]
_SPLIT_CODES: dict[Split, int] = {"train": 0, "calibration": 1, "held_out": 2}

IMAGE_SIZE = 320  # pixels per side
TOKENS_PER_SIDE = 10  # vision tokens per side; one covers 32 x 32 pixels
CELLS_PER_SIDE = 3
CELLS = CELLS_PER_SIDE**2
OBJECT_COUNT = (3, 8)  # fewest and most objects of a scene
POSITIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
"""The name of each cell, in row-major order."""

_HELD_OUT_SHARE = 0.1  # of all pairs of an object and a cell
_REPEAT_SHARE = 0.25  # of the objects after the first: a further one of the names already drawn


@dataclass(frozen=True)
class PhotoObject:
    """One object: its cell (row-major, 0 to 8) and its name."""

    cell: int
    name: str

    @property
    def position(self) -> str:
        """Name of the cell."""
        return POSITIONS[self.cell]


@dataclass(frozen=True)
class PhotoScene:
    """The objects in row-major order of their cells, and the name of the background."""

    objects: tuple[PhotoObject, ...]
    background: str
    split: Split

    def at(self, cell: int) -> PhotoObject | None:
        """The object in ``cell``, or None."""
        return next((one for one in self.objects if one.cell == cell), None)

    def counts(self) -> Counter[str]:
        """How often each name occurs."""
        return Counter(one.name for one in self.objects)

    def unique(self) -> list[PhotoObject]:
        """The objects whose name occurs once."""
        counts = self.counts()
        return [one for one in self.objects if counts[one.name] == 1]


def is_held_out(name: str, cell: int) -> bool:
    """Whether no training scene has the object ``name`` in ``cell``."""
    return zlib.crc32(f"{name}/{cell}".encode()) % 1000 < 1000 * _HELD_OUT_SHARE


def scene_generator(split: Split, seed: int, number: int) -> np.random.Generator:
    """The random generator of one scene and of everything that is drawn for it."""
    return np.random.default_rng([_SPLIT_CODES[split], seed, number])


def draw_scene(rng: np.random.Generator, split: Split) -> PhotoScene:
    """A random scene of ``split``."""
    held_out = split != "train"
    while True:
        count = int(rng.integers(OBJECT_COUNT[0], OBJECT_COUNT[1] + 1))
        cells = sorted(int(cell) for cell in rng.choice(CELLS, size=count, replace=False))
        names = _draw_names(rng, count)
        pairs = [is_held_out(name, cell) for name, cell in zip(names, cells, strict=True)]
        if any(pairs) == held_out:
            break
    backgrounds = _backgrounds_of(split)
    objects = tuple(PhotoObject(cell, name) for name, cell in zip(names, cells, strict=True))
    return PhotoScene(objects, backgrounds[int(rng.integers(len(backgrounds)))], split)


def _backgrounds_of(split: Split) -> list[str]:
    return [name for name in BACKGROUNDS if (name in HELD_OUT_BACKGROUNDS) == (split != "train")]


def _draw_names(rng: np.random.Generator, count: int) -> list[str]:
    names: list[str] = []
    for _ in range(count):
        known = names if names and rng.random() < _REPEAT_SHARE else NAMES
        names.append(known[int(rng.integers(len(known)))])
    rng.shuffle(names)
    return names


def cell_tokens(cell: int) -> tuple[int, ...]:
    """The vision tokens (row-major) whose centres lie in ``cell``."""
    row, column = divmod(cell, CELLS_PER_SIDE)
    centres = (np.arange(TOKENS_PER_SIDE) + 0.5) * CELLS_PER_SIDE / TOKENS_PER_SIDE
    rows, columns = np.flatnonzero(centres.astype(int) == row), np.flatnonzero(centres.astype(int) == column)
    return tuple(int(y) * TOKENS_PER_SIDE + int(x) for y in rows for x in columns)


def render_scene(scene: PhotoScene, assets: PhotoAssets, rng: np.random.Generator) -> Image.Image:
    """The picture, RGB of `IMAGE_SIZE` squared: a random cutting of the background, objects at random angles.

    The few backgrounds of training scenes are varied in colour, too, and half of them blended with another one.
    """
    picture = _draw_background(assets.backgrounds[scene.background], rng)
    if scene.split == "train":
        picture = _vary_background(picture, assets, rng)
    side = IMAGE_SIZE / CELLS_PER_SIDE
    for one in scene.objects:
        pictures = assets.objects[one.name]
        stamp = _vary(pictures[int(rng.integers(len(pictures)))], side * rng.uniform(0.78, 1.0), rng)
        row, column = divmod(one.cell, CELLS_PER_SIDE)
        shift_x, shift_y = rng.uniform(-6, 6, size=2)
        left = round((column + 0.5) * side - stamp.width / 2 + shift_x)
        top = round((row + 0.5) * side - stamp.height / 2 + shift_y)
        picture.paste(stamp, (left, top), stamp)
    return picture


def _draw_background(background: Image.Image, rng: np.random.Generator) -> Image.Image:
    smallest = min(background.size)
    side = int(rng.integers(min(IMAGE_SIZE, smallest // 2), smallest + 1))
    left = int(rng.integers(background.width - side + 1))
    top = int(rng.integers(background.height - side + 1))
    picture = background.resize(
        (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture


def _vary_background(picture: Image.Image, assets: PhotoAssets, rng: np.random.Generator) -> Image.Image:
    if rng.random() < 0.5:
        others = _backgrounds_of("train")
        other = _draw_background(assets.backgrounds[others[int(rng.integers(len(others)))]], rng)
        picture = Image.blend(picture, other, rng.uniform(0.2, 0.8))
    if rng.random() < 0.5:
        bands = picture.split()
        picture = Image.merge("RGB", [bands[int(band)] for band in rng.permutation(3)])
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.ROTATE_90)
    gain, offset = rng.uniform(0.6, 1.3), rng.uniform(-30, 30)
    return picture.point(lambda level: (level - 128) * gain + 128 + offset)


def _vary(stamp: Image.Image, longer_side: float, rng: np.random.Generator) -> Image.Image:
    """The object mirrored or not, turned by up to 15 degrees, scaled, brighter or darker."""
    if rng.random() < 0.5:
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    stamp = stamp.rotate(rng.uniform(-15, 15), expand=True, resample=Image.Resampling.BILINEAR)
    scale = longer_side / max(stamp.size)
    size = (max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale)))
    stamp = stamp.resize(size, Image.Resampling.BILINEAR)
    gain = rng.uniform(0.8, 1.15)
    *colours, alpha = stamp.split()
    return Image.merge("RGBA", [*(band.point(lambda level: level * gain) for band in colours), alpha])
