"""Draws the objects of a demo scene."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from collections.abc import Iterable

    Colour = tuple[int, int, int]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 50, 45),
    "orange": (245, 145, 30),
    "yellow": (240, 225, 60),
    "green": (55, 170, 65),
    "cyan": (70, 215, 225),
    "blue": (60, 95, 235),
    "purple": (160, 75, 205),
    "white": (240, 240, 240),
}
_SUPERSAMPLING = 4  # shapes are drawn this many times larger and averaged down


def draw_objects(
    objects: Iterable[tuple[Colour, str, int, int]], grid: int, cell: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws (colour, shape, row, column) on a noisy background: uint8 (grid * cell, grid * cell, 3)."""
    picture = _background(grid * cell, rng)
    for base, shape, row, column in objects:
        _paint(picture, *_appearance(base, shape, cell, rng), row, column)
    return _noisy(picture, rng)


def draw_frames(
    objects: Iterable[tuple[tuple[Colour, str, int, int], Iterable[int]]],
    frames: int,
    grid: int,
    cell: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """As `draw_objects`, of objects with the frames that show them: uint8 (frames, grid * cell, grid * cell, 3).

    From one frame to the next, only the noise and the objects that appear or disappear change.
    """
    pictures = np.repeat(_background(grid * cell, rng)[None], frames, axis=0)
    for (base, shape, row, column), shown in objects:
        look = _appearance(base, shape, cell, rng)
        for frame in shown:
            _paint(pictures[frame], *look, row, column)
    return _noisy(pictures, rng)


def _background(side: int, rng: np.random.Generator) -> np.ndarray:
    start, stop = rng.uniform(20, 80, size=(2, 3))
    direction = rng.uniform(-1, 1, size=2)
    axis = np.linspace(-0.5, 0.5, side)
    ramp = 0.5 + (axis[:, None] * direction[0] + axis[None, :] * direction[1]) / 2
    background: np.ndarray = start + ramp[..., None] * (stop - start)
    return background


def _appearance(
    base: Colour, shape: str, cell: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of a cell's pixels, and colour."""
    mask = _draw_mask(shape, cell, rng)[..., None]
    return mask, np.array(base) + rng.uniform(-14, 14, size=3)


def _paint(picture: np.ndarray, mask: np.ndarray, colour: np.ndarray, row: int, column: int) -> None:
    cell = len(mask)
    pixels = picture[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
    pixels += mask * (colour - pixels)


def _noisy(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    picture += rng.standard_normal(picture.shape, dtype=np.float32) * rng.uniform(1, 5)
    drawn: np.ndarray = np.clip(picture, 0, 255).astype(np.uint8)
    return drawn


def _draw_mask(shape: str, cell: int, rng: np.random.Generator) -> np.ndarray:
    """Coverage of a cell's pixels by a shape of random size, angle and position: (cell, cell) in 0 ... 1."""
    radius = rng.uniform(3.9, 5.4)  # pixels
    turn = rng.uniform(-0.2, 0.2)  # radians
    slack = cell / 2 - radius - 0.3
    centre = cell / 2 + rng.uniform(-slack, slack, size=2)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    side = cell * _SUPERSAMPLING
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    for outline, fill in _OUTLINES[shape]:
        points = (outline @ rotation * radius + centre) * _SUPERSAMPLING
        pen.polygon(points.ravel().tolist(), fill=fill)
    return np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float64) / 255


def _regular(corners: int, radius: float = 1.0, turn: float = 0.0) -> np.ndarray:
    """Corners of a regular polygon, the first one on top: (corners, 2) as x, y with y downwards."""
    angles = 2 * np.pi * np.arange(corners) / corners + turn
    return radius * np.stack([np.sin(angles), -np.cos(angles)], axis=1)


def _star() -> np.ndarray:
    points = _regular(10)
    points[1::2] *= 0.42
    return points


def _cross() -> np.ndarray:
    arm = 0.3
    corner = np.array([[-arm, -1.0], [arm, -1.0], [arm, -arm]])
    quarter_turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return np.concatenate([corner @ np.linalg.matrix_power(quarter_turn, n) for n in range(4)])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return np.stack([x, y - 0.1], axis=1)


# Polygons of each shape with radius 1, painted in turn; fill 0 cuts a hole.
_OUTLINES: dict[str, list[tuple[np.ndarray, int]]] = {
    "circle": [(_regular(24, 0.9), 255)],
    "ring": [(_regular(24), 255), (_regular(24, 0.5), 0)],
    "square": [(_regular(4, 1.15, math.pi / 4), 255)],
    "diamond": [(_regular(4) * np.array([0.62, 1.05]), 255)],
    "triangle": [(_regular(3, 1.05), 255)],
    "cross": [(_cross(), 255)],
    "star": [(_star(), 255)],
    "heart": [(_heart(), 255)],
}
