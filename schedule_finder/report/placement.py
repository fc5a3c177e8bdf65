"""Where the vision tokens of a sample lie in its pictures.

The runtime's patch map says which patches of the vision tower make each token. The pictures are what the tower sees:
its input pixels where they are pictures (crops, tiles and padding are then placed correctly), else the sample's own
images where the tower gets one sequence of patches per image. Tokens that no rule places are left out with a note.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pruning_runtime.errors import UnsupportedBackbone
from pruning_runtime.tower import find_tower
from pruning_runtime.tower.patch_map import PatchMap, configuration_digest, find_patch_map
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.samples import Sample

Place = tuple[int, int, int]
"""Panel, row and column of a token."""
Cut = tuple[Tensor, tuple[float, float]]
"""Pixels ``[3, height, width]`` and the shares of width and height that patches cover."""


@dataclass(frozen=True)
class Panel:
    """A picture with a grid of tokens.

    Attributes:
        picture: what the vision tower sees.
        rows, columns: of the grid.
        width, height: share of the picture that the grid covers, from its upper left corner.
    """

    picture: Image.Image
    rows: int
    columns: int
    width: float = 1.0
    height: float = 1.0


@dataclass(frozen=True)
class Placement:
    """Pictures of a sample and the place of each vision token, None where it has none; ``note`` says what is missing."""

    panels: tuple[Panel, ...]
    places: tuple[Place | None, ...]
    note: str | None = None


def place_tokens(loaded: LoadedBackbone, sample: Sample, inputs: dict[str, Tensor]) -> Placement:
    """Pictures and places of the vision tokens of one sample.

    Args:
        loaded: the backbone.
        sample: with its images.
        inputs: of this sample alone, on the backbone's device.
    """
    vision = loaded.backbone.vision_mask(inputs["input_ids"])
    count = int(vision.sum())
    if sample.videos:
        return _unplaced(count, "tokens of videos are not placed")
    try:
        tower = find_tower(loaded.backbone)
        digest = configuration_digest(loaded.backbone)
        known = find_patch_map(loaded.backbone, tower, digest, vision, (), inputs)
    except UnsupportedBackbone as error:
        return _row_by_row(loaded, inputs, count) or _unplaced(count, f"tokens are not placed: {error}")
    if not known.has_places:
        return _unplaced(count, "tokens are not placed: rows and columns of the vision tower are unknown")
    pictures = _pictures(loaded, sample, inputs, known, _edge(tower.config))
    if pictures is None:
        return _unplaced(
            count, "tokens are not placed: the vision tower's input is not one picture per image"
        )
    return _on_panels(known, pictures)


def _on_panels(known: PatchMap, pictures: list[Panel]) -> Placement:
    places: list[Place | None] = []
    table = torch.stack([known.image, known.row, known.column]).T.tolist()
    for image, row, column in table:
        places.append((image, row, column) if min(image, row) >= 0 else None)
    missing = places.count(None)
    note = f"{missing} tokens have no place, such as those that mark the end of a row" if missing else None
    return Placement(tuple(pictures), tuple(places), note)


def _unplaced(count: int, note: str) -> Placement:
    return Placement((), (None,) * count, note)


# ---- pictures


def _pictures(
    loaded: LoadedBackbone, sample: Sample, inputs: dict[str, Tensor], known: PatchMap, edge: tuple[int, int]
) -> list[Panel] | None:
    """One picture per image of the tower, with its grid; None where they are unknown."""
    number = int(known.image.max()) + 1
    sizes = []
    for image in range(number):
        inside = known.image == image
        sizes.append((int(known.rows[inside].max()), int(known.columns[inside].max())))
    panels = _from_pixels(loaded, inputs, sizes, edge)
    if panels is None and len(sample.images) == number:
        return [Panel(image, *size) for image, size in zip(sample.images, sizes, strict=True)]
    return panels


def _from_pixels(
    loaded: LoadedBackbone, inputs: dict[str, Tensor], sizes: list[tuple[int, int]], edge: tuple[int, int]
) -> list[Panel] | None:
    """The tower's input where it is one picture per image, with as many patches as the grids need."""
    pixels = _pixels(inputs)
    if pixels is not None and len(pixels) != len(sizes):
        pixels = pixels[pixels.flatten(1).any(1)]  # absent tiles are zero
    if pixels is None or len(pixels) != len(sizes):
        return None
    panels = []
    for one, real, (rows, columns) in zip(pixels, _real_sizes(inputs, pixels), sizes, strict=True):
        picture, covered = _cut(one, edge, real)
        down, across = picture.shape[-2] // edge[0], picture.shape[-1] // edge[1]
        if down % rows or across % columns or down // rows != across // columns:
            return None  # a line of patches, not a picture
        panels.append(Panel(_to_picture(loaded, picture), rows, columns, *covered))
    return panels


def _pixels(inputs: dict[str, Tensor]) -> Tensor | None:
    """The tower's input as pictures, ``[pictures, 3, height, width]``; None where it is a list of patches."""
    for name, value in inputs.items():
        if "pixel" in name and "mask" not in name and value.dim() >= 4 and value.shape[-3] == 3:
            return value.flatten(0, -4).float().cpu()
    return None


def _real_sizes(inputs: dict[str, Tensor], pixels: Tensor) -> list[tuple[int, int]]:
    """Height and width of each picture without the padding to the largest one."""
    whole = (pixels.shape[-2], pixels.shape[-1])
    sizes = inputs.get("image_sizes")
    if sizes is None or len(sizes) != len(pixels):
        return [whole] * len(pixels)
    return [(min(int(height), whole[0]), min(int(width), whole[1])) for height, width in sizes.tolist()]


def _cut(pixels: Tensor, edge: tuple[int, int], size: tuple[int, int]) -> Cut:
    """The picture without padding, and the shares of its width and height that whole patches cover."""
    height, width = size
    covered = (_covered(width, edge[1]), _covered(height, edge[0]))
    return pixels[:, :height, :width], covered


def _covered(side: int, patch: int) -> float:
    return side // patch * patch / side if patch <= side else 1.0


def _edge(config: Any) -> tuple[int, int]:
    """Height and width of a patch in pixels."""
    size = getattr(config, "patch_size", None) or 1
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))


def _to_picture(loaded: LoadedBackbone, pixels: Tensor) -> Image.Image:
    """Undo the processor's normalisation."""
    processor: Any = getattr(loaded.processor, "image_processor", None)
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if getattr(processor, "do_normalize", False) and mean is not None and std is not None:
        shape = (3, 1, 1)
        pixels = pixels * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    elif pixels.min() < 0 or pixels.max() > 1:
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-6)
    levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.permute(1, 2, 0).numpy()))


# ---- towers without a patch map


def _row_by_row(loaded: LoadedBackbone, inputs: dict[str, Tensor], count: int) -> Placement | None:
    """Tokens of one picture in rows, where their number is that of a grid of the picture's own proportions."""
    pixels = _pixels(inputs)
    if pixels is None or len(pixels) != 1:
        return None
    height, width = pixels.shape[-2:]
    rows = math.isqrt(count * height // width) if width else 0
    if not rows or count % rows or rows * width != (count // rows) * height:
        return None
    columns = count // rows
    panel = Panel(_to_picture(loaded, pixels[0]), rows, columns)
    places = tuple((0, token // columns, token % columns) for token in range(count))
    note = "the vision tower has no attention blocks to trace; tokens are placed row by row"
    return Placement((panel,), places, note)
