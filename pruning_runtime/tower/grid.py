"""The place of each vision token in its image, from the map of patches and the model's inputs.

Two facts are needed: the images of the tower's positions, with rows and columns of patches, and the patches of each
token. The first is read from the inputs by its numbers, not by family: sizes in patches or in pixels, one per image,
whose areas add up to the number of patches, or the size of the pixels themselves. Where none fits, tokens have no place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Places:
    """Place of each vision token: long ``[vision tokens]``, -1 where unknown.

    ``row`` and ``column`` count tokens in the image, which has ``rows`` and ``columns`` of them; ``image`` numbers
    images, tiles and frames.
    ``known``: every token with a patch has a place.
    """

    row: Tensor
    column: Tensor
    rows: Tensor
    columns: Tensor
    image: Tensor
    known: bool


@dataclass(frozen=True, slots=True)
class _Image:
    """The patches of an image or video: flat positions, frame by frame and row by row."""

    positions: Tensor
    frames: int
    rows: int
    columns: int


def find_places(
    members: Tensor,
    runs: Sequence[tuple[int, int]],
    fixed: Sequence[int],
    config: PreTrainedConfig,
    inputs: Mapping[str, Any],
) -> Places:
    """Places of all vision tokens.

    Args:
        members: positions of each token's patches, ``[vision tokens, most patches]``, -1 after the last.
        runs: sequences and positions per sequence of each run of the tower.
        fixed: positions of a sequence that are not patches.
        config: of the tower.
        inputs: of the model.
    """
    row, column, rows, columns, image = torch.full((5, members.shape[0]), -1).unbind()
    places = Places(row, column, rows, columns, image, known=True)
    known, number, offset, taken = True, 0, 0, set[str]()
    for sequences, length in runs:
        patches = [position for position in range(length) if position not in set(fixed)]
        flat = offset + torch.arange(sequences)[:, None] * length + torch.tensor(patches)
        offset += sequences * length
        images = _find_images(flat, members, _patch_size(config), inputs, taken)
        if images is None:
            known = False
            images = [_Image(sequence, 1, 1, len(patches)) for sequence in flat]
            number = _place(images, members, places, number, with_grid=False)[0]
            continue
        number, all_placed = _place(images, members, places, number, with_grid=True)
        known &= all_placed
    return replace(places, known=known)


# ---- images of the tower


def _find_images(
    flat: Tensor, members: Tensor, patch: tuple[int, int], inputs: Mapping[str, Any], taken: set[str]
) -> list[_Image] | None:
    """Images of one run of the tower; ``flat`` holds the positions of its patches, ``[sequences, patches]``."""
    sequences, per_sequence = flat.shape
    sizes = [(name, value.tolist()) for name, value in _size_tensors(inputs) if name not in taken]
    for name, table in sizes:
        if images := _packed_images(flat, [_frames(size) for size in table]):
            taken.add(name)
            return images
        if len(table) == sequences and (
            images := _padded_images(flat, members, [_frames(size) for size in table])
        ):
            return images
    for value in inputs.values():
        if isinstance(value, Tensor) and value.shape == (sequences, per_sequence, 2):
            return _coordinate_images(flat, value.cpu())
    for rows, columns in _pixel_grids(inputs, patch):
        if rows * columns == per_sequence:
            return [_Image(sequence, 1, rows, columns) for sequence in flat]
    in_pixels = [[(1, size[-2] // patch[0], size[-1] // patch[1]) for size in table] for _, table in sizes]
    # A tower may merge 2 x 2 patches between its blocks.
    merged = [[(f, h // 2, w // 2) for f, h, w in map(_frames, table)] for _, table in sizes]
    for grids in in_pixels + merged:
        if images := _packed_images(flat, grids):
            return images
    edge = math.isqrt(per_sequence)
    if sequences > 1 and edge**2 == per_sequence:
        return [_Image(sequence, 1, edge, edge) for sequence in flat]
    return None


def _size_tensors(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Integer inputs with two or three numbers per image."""
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.is_floating_point() or value.dim() != 2:
            continue
        if value.shape[1] in (2, 3) and name not in ("input_ids", "attention_mask"):
            yield name, value


def _frames(size: Sequence[int]) -> tuple[int, int, int]:
    return (size[0], size[1], size[2]) if len(size) == 3 else (1, size[0], size[1])


def _packed_images(flat: Tensor, grids: Sequence[tuple[int, int, int]]) -> list[_Image] | None:
    """Images that fill the positions one after the other."""
    areas = [math.prod(grid) for grid in grids]
    if sum(areas) != flat.numel() or min(areas) < 1:
        return None
    return [_Image(part, *grid) for part, grid in zip(flat.flatten().split(areas), grids, strict=True)]


def _padded_images(
    flat: Tensor, members: Tensor, grids: Sequence[tuple[int, int, int]]
) -> list[_Image] | None:
    """One image per sequence, padding after it; exactly the patches of the images feed tokens."""
    areas = [math.prod(grid) for grid in grids]
    used = torch.isin(flat, members)
    if used.sum(1).tolist() != areas or any(not used[i, :area].all() for i, area in enumerate(areas)):
        return None
    return [_Image(flat[i, :area], *grids[i]) for i, area in enumerate(areas)]


def _coordinate_images(flat: Tensor, coordinates: Tensor) -> list[_Image]:
    """Images whose inputs state the column and the row of each patch; -1 at padding."""
    images = []
    for sequence, pairs in zip(flat, coordinates, strict=True):
        real = (pairs >= 0).all(-1)
        column, row = pairs[real].unbind(-1)
        rows, columns = int(row.max()) + 1, int(column.max()) + 1
        ordered = torch.full((rows * columns,), -2)
        ordered[row * columns + column] = sequence[real]
        images.append(_Image(ordered, 1, rows, columns))
    return images


def _pixel_grids(inputs: Mapping[str, Any], patch: tuple[int, int]) -> Iterator[tuple[int, int]]:
    for name, value in inputs.items():
        if "pixel" in name and "mask" not in name and isinstance(value, Tensor) and value.dim() >= 4:
            yield value.shape[-2] // patch[0], value.shape[-1] // patch[1]


def _patch_size(config: PreTrainedConfig) -> tuple[int, int]:
    size = getattr(config, "patch_size", None) or 1
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


# ---- tokens in their images


def _place(
    images: Sequence[_Image], members: Tensor, places: Places, number: int, *, with_grid: bool
) -> tuple[int, bool]:
    """Write the places of the tokens of ``images``; returns the next free image number and whether all were placed."""
    all_placed = True
    for image in images:
        first = members[:, 0]
        tokens = (torch.isin(first, image.positions) & (first >= 0)).nonzero().flatten()
        if not len(tokens):
            continue
        places.image[tokens] = number
        found = (
            (_by_patches(image, members[tokens]) or _by_order(image, members[tokens])) if with_grid else None
        )
        if found is None:
            all_placed &= not with_grid
            number += 1
            continue
        frame, places.row[tokens], places.column[tokens], size = found
        places.rows[tokens], places.columns[tokens] = image.rows // size, image.columns // size
        places.image[tokens] += frame
        number += int(frame.max()) + 1
    return number, all_placed


def _by_patches(image: _Image, members: Tensor) -> tuple[Tensor, Tensor, Tensor, int] | None:
    """Frame, row, column and size in patches of tokens that are square blocks of the image's patches, all of one size."""
    index = torch.full((int(max(members.max(), image.positions.max())) + 1,), -1)
    inside = image.positions >= 0
    index[image.positions[inside]] = inside.nonzero().flatten()
    place = torch.where(members >= 0, index[members.clamp(min=0)], -1)
    if bool(((place < 0) & (members >= 0)).any()):
        return None  # patches of several images
    low, high = [], []
    for part in (
        place // (image.rows * image.columns),
        place // image.columns % image.rows,
        place % image.columns,
    ):
        low.append(part.masked_fill(members < 0, 2**31).amin(1))
        high.append(part.masked_fill(members < 0, -1).amax(1))
    frames, heights, widths = (top - bottom + 1 for bottom, top in zip(low, high, strict=True))
    size, depth = int(heights[0]), int(frames[0])
    is_block = (heights == size) & (widths == size) & (frames == depth)
    is_block &= (members >= 0).sum(1) == depth * size**2
    is_block &= (low[1] % size == 0) & (low[2] % size == 0)
    if not bool(is_block.all()):
        return None
    return low[0] // depth, low[1] // size, low[2] // size, size


def _by_order(image: _Image, members: Tensor) -> tuple[Tensor, Tensor, Tensor, int] | None:
    """The same where patches are not row by row: tokens are, and have equally many patches."""
    count = (members >= 0).sum(1)
    each, tokens = int(count[0]), len(members)
    if not bool((count == each).all()) or tokens * each != len(image.positions):
        return None
    sizes = (s for s in range(math.isqrt(each), 0, -1) if not each % s**2)
    size = next((s for s in sizes if not (image.rows % s or image.columns % s)), None)
    if size is None or image.frames % (each // size**2):
        return None
    number, rows, columns = torch.arange(tokens), image.rows // size, image.columns // size
    return number // (rows * columns), number // columns % rows, number % columns, size
