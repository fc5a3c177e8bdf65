"""The patch map: which tower positions make each vision token, found once for prompts of one shape."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pruning_runtime.backbone import Backbone
from pruning_runtime.errors import UnsupportedBackbone
from pruning_runtime.tower.blocks import VisionTower
from pruning_runtime.tower.grid import find_places
from pruning_runtime.tower.probe import Probed, probe

_OF_THE_TEXT = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "cache_position",
        "token_type_ids",
        "mm_token_type_ids",
        "moe_mm_token_type_ids",
        "labels",
        "logits_to_keep",
        "past_key_values",
        "use_cache",
    }
)
"""Inputs that say nothing about images. Others are compared, so an unknown one costs a probe, not a wrong map."""
_MOST_MAPS = 128


@dataclass(frozen=True)
class PatchMap:
    """The tower positions of each vision token of a prompt.

    Vision tokens are flat, row-major over the batch; positions are numbered over all runs of the tower in one forward.

    Attributes:
        feeding: the block that feeds the decoder.
        whole: blocks whose attention spans whole images.
        cls: position of the CLS token in each sequence; None for a tower without.
        positions: positions of all runs together, by block.
        members: positions of each token's patches, ``[vision tokens, most patches]``, -1 after the last.
        row, column, rows, columns, image: place of each token, see `Places`.
        has_places: whether every token with a patch has a place.
        tile: number of each token's image in its row of the batch; a token without a patch follows the one before.
        num_tiles, largest_tile: images of a row and tokens of an image, maxima over the rows.
    """

    feeding: int
    whole: frozenset[int]
    cls: int | None
    positions: tuple[int, ...]
    members: Tensor
    row: Tensor
    column: Tensor
    rows: Tensor
    columns: Tensor
    image: Tensor
    has_places: bool
    tile: Tensor
    num_tiles: int
    largest_tile: int
    _on_device: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device) -> tuple[Tensor, ...]:
        """``members``, ``row``, ``column``, ``rows``, ``columns``, ``image`` and ``tile`` on ``device``; copied once."""
        if device not in self._on_device:
            places = self.row, self.column, self.rows, self.columns, self.image, self.tile
            self._on_device[device] = tuple(tensor.to(device) for tensor in (self.members, *places))
        return self._on_device[device]

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each token's patches of ``[positions]`` or ``[positions, width]``; NaN without a patch."""
        members = self.to(values.device)[0]
        has = members >= 0
        picked = values[members.clamp(min=0)]
        weight = has.view(*has.shape, *[1] * (picked.dim() - 2))
        # 0 / 0 is the NaN of a token without a patch.
        return torch.where(weight, picked, 0).sum(1) / weight.sum(1)


_maps: OrderedDict[str, PatchMap] = OrderedDict()


def configuration_digest(backbone: Backbone) -> str:
    """Hash of the class and the whole configuration, the tower's part included."""
    config = backbone.model.config.to_json_string(use_diff=False)
    return hashlib.sha256(f"{type(backbone.model).__name__} {config}".encode()).hexdigest()


def find_patch_map(
    backbone: Backbone,
    tower: VisionTower,
    digest: str,
    vision: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> PatchMap:
    """The patch map of a prompt; from memory where a prompt of the same shape was seen before.

    The memory is shared by all models with the same configuration. Reads the sizes of images on the host.

    Args:
        backbone: the model and its parts.
        tower: of the model.
        digest: of the configuration.
        vision: the prompt's vision tokens, bool ``[batch, length]``.
        args, kwargs: of the model's forward.

    Raises:
        UnsupportedBackbone: the tower's positions are no partition over the vision tokens.
    """
    key = _signature(digest, vision, args, kwargs)
    if key not in _maps:
        _maps[key] = _make(backbone, tower, vision, args, kwargs)
        while len(_maps) > _MOST_MAPS:
            _maps.popitem(last=False)
    _maps.move_to_end(key)
    return _maps[key]


def _make(
    backbone: Backbone, tower: VisionTower, vision: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> PatchMap:
    probed = probe(backbone, tower, vision, args, kwargs)
    members = _members(probed.owner, int(vision.sum()), _is_patch(probed.runs, probed.fixed))
    if not members.numel():
        raise UnsupportedBackbone(
            f"{type(backbone.model).__name__}: no vision token comes from a patch of {tower.path}; "
            "use a scorer that does not read the tower"
        )
    places = find_places(members, probed.runs, probed.fixed, tower.config, kwargs)
    tile = _tiles(places.image, vision.sum(1).tolist())
    return PatchMap(
        feeding=probed.feeding,
        whole=_whole(probed),
        cls=probed.fixed[0] if probed.fixed else None,
        positions=probed.positions,
        members=members,
        row=places.row,
        column=places.column,
        rows=places.rows,
        columns=places.columns,
        image=places.image,
        has_places=places.known,
        tile=torch.cat(tile),
        num_tiles=max(int(part.max()) + 1 for part in tile if len(part)),
        largest_tile=max(int(part.bincount().max()) for part in tile if len(part)),
    )


def _tiles(image: Tensor, counts: list[int]) -> list[Tensor]:
    """Number of each token's image among those of its row, for the tokens of each row."""
    tiles = []
    for part in image.split(counts):
        known, number = part.unique(return_inverse=True)
        number = number - int((known == -1).any())
        # A token without a patch follows the last one with a patch; those before all go to the first image.
        last = torch.where(part >= 0, torch.arange(len(part)), -1).cummax(0).values if len(part) else part
        tiles.append(torch.where(last >= 0, number[last.clamp(min=0)], 0) if len(part) else part)
    return tiles


def _whole(probed: Probed) -> frozenset[int]:
    """Blocks up to the feeding one whose attention sequences are the largest share of their positions."""
    blocks = range(probed.feeding + 1)
    shares = [probed.spans[block] / max(probed.positions[block], 1) for block in blocks]
    return frozenset(block for block in blocks if shares[block] == max(shares))


def _is_patch(runs: tuple[tuple[int, int], ...], fixed: tuple[int, ...]) -> Tensor:
    """True at the positions that hold a patch, ``[positions]``."""
    parts = []
    for sequences, length in runs:
        one = torch.ones(length, dtype=torch.bool)
        one[list(fixed)] = False
        parts.append(one.repeat(sequences))
    return torch.cat(parts)


def _members(owner: Tensor, tokens: int, is_patch: Tensor) -> Tensor:
    """Positions of each token's patches, ``[tokens, most patches]``, ascending, -1 after the last."""
    owner = owner.masked_fill(~is_patch, -1)
    positions = (owner >= 0).nonzero().flatten()
    owned = owner[positions]
    order = owned.argsort(stable=True)
    count = torch.bincount(owned, minlength=tokens)
    first = count.cumsum(0) - count
    slot = torch.arange(len(positions)) - first[owned[order]]
    members = torch.full((tokens, int(count.max()) if tokens else 0), -1)
    members[owned[order], slot] = positions[order]
    return members


# ---- prompts of the same shape


def _signature(digest: str, vision: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Hash of all that the map depends on: the configuration, the sizes of images, the order of vision tokens."""
    hashed = hashlib.sha256(digest.encode())
    input_ids = kwargs.get("input_ids", args[0] if args else None)
    hashed.update(repr(tuple(vision.sum(1).tolist())).encode())
    if isinstance(input_ids, Tensor) and not input_ids.is_floating_point():
        hashed.update(_bytes(input_ids[vision.to(input_ids.device)]))
    for part in _described({name: value for name, value in kwargs.items() if name not in _OF_THE_TEXT}):
        hashed.update(part)
    return hashed.hexdigest()


def _described(inputs: Mapping[str, Any]) -> Iterator[bytes]:
    for name, value in sorted(inputs.items()):
        if isinstance(value, Tensor):
            yield f"{name}{tuple(value.shape)}".encode()
            if not value.is_floating_point():
                yield _bytes(value)
        elif value is not None:
            yield f"{name}{value!r}".encode()


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().numpy().tobytes()
