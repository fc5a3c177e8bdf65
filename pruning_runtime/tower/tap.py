"""Collect statistics of the vision tower while the model runs: saliency, states and keys of each vision token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_runtime.backbone import Backbone
from pruning_runtime.errors import PruningError, UnsupportedBackbone
from pruning_runtime.tower.blocks import VisionTower, block_at, find_tower
from pruning_runtime.tower.kernel import BlockAttention, tapped_blocks
from pruning_runtime.tower.patch_map import PatchMap, configuration_digest, find_patch_map
from pruning_runtime.tower.received import attention_of, received_attention

DEPTHS = ("deep", "middle", "shallow")
RECEIVED = "_received"
"""Suffix of a saliency that is received attention in towers with a CLS token too."""


@dataclass(frozen=True, slots=True)
class TowerNeeds:
    """What a rule needs of the tower.

    Attributes:
        saliency: ``deep``, ``middle``, ``shallow``: the CLS token's attention row where the tower has one, else
            received attention; with ``_received`` behind it, received attention in any case.
        states, keys: of the block that feeds the decoder.
        places: whether the rule needs rows and columns.
    """

    saliency: frozenset[str] = frozenset({"deep"})
    states: bool = False
    keys: bool = False
    places: bool = False

    def __post_init__(self) -> None:
        known = {depth + suffix for depth in DEPTHS for suffix in ("", RECEIVED)}
        if unknown := self.saliency - known:
            raise ValueError(f"unknown saliency {sorted(unknown)}; known: {', '.join(sorted(known))}")

    def __or__(self, other: TowerNeeds) -> TowerNeeds:
        """What both rules need."""
        return TowerNeeds(
            self.saliency | other.saliency,
            self.states or other.states,
            self.keys or other.keys,
            self.places or other.places,
        )


@dataclass(frozen=True, slots=True)
class TowerStatistics:
    """Statistics of each vision token, row-major over the batch; a token's are the means over its patches.

    Attributes:
        saliency: by name, float32 ``[vision tokens]``; NaN where a token has no patch (image newlines).
        states: output of the feeding block, float32 ``[vision tokens, width]``; NaN without a patch.
        keys: of the ``deep`` block, after RoPE, mean over heads, float32 ``[vision tokens, head_dim]``.
        row, column: place of the token in its image, in tokens, long ``[vision tokens]``; -1 where unknown.
        rows, columns: of that image, in tokens.
        image: number of the image, tile or frame in the batch, long ``[vision tokens]``; -1 without a patch.
        tile: its number in the row of the batch; a token without a patch belongs to the tile of the one before.
        num_tiles, largest_tile: tiles of a row and tokens of a tile, maxima over the rows, known on the host.
        has_cls: whether the tower has a CLS token.
    """

    saliency: dict[str, Tensor]
    states: Tensor | None
    keys: Tensor | None
    row: Tensor
    column: Tensor
    rows: Tensor
    columns: Tensor
    image: Tensor
    tile: Tensor
    num_tiles: int
    largest_tile: int
    has_cls: bool


@dataclass
class _Collected:
    """Parts of one forward, in the order of attention calls; positions are flat."""

    saliency: dict[str, list[Tensor]] = field(default_factory=dict)
    keys: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)


class TowerTap:
    """Collects what ``needs`` names in every forward with images; `tower_tap` makes one.

    Args:
        backbone: the model and its parts.
        needs: what is collected.
        vision_mask: vision tokens of prompts, where they cannot be found by id, bool ``[batch, length]``.

    Attributes:
        patch_map: of the last prompt; None if it had no images.
        probing: the model runs to find a patch map; its hooks should do nothing.
    """

    def __init__(self, backbone: Backbone, needs: TowerNeeds, vision_mask: Tensor | None = None) -> None:
        self._backbone, self._needs, self._vision_mask = backbone, needs, vision_mask
        self._tower: VisionTower = find_tower(backbone)
        self._digest = configuration_digest(backbone)
        self.probing = False
        self._encoded = False
        self._counts: list[int] = []
        self._names: dict[int, list[str]] = {}
        self._deep = -1
        self.patch_map: PatchMap | None = None
        self._collected = _Collected()
        self._installed = ExitStack()

    # ---- hooks

    def before_model(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the whole model: find the patch map of a prompt and tap the blocks that are needed."""
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            return
        encoded, self._encoded = self._encoded and not _has_pixels(kwargs), False
        if not encoded:
            self._prepare(args, kwargs)

    def before_encoding(self, input_ids: Any, kwargs: dict[str, Any]) -> None:
        """The same before `generate` runs the tower; it then calls the model with the tower's output."""
        accepted = inspect.signature(self._backbone.model.forward).parameters
        if isinstance(input_ids, Tensor) and not input_ids.is_floating_point() and _has_pixels(kwargs):
            given = {name: value for name, value in kwargs.items() if name in accepted}
            self._prepare((), {**given, "input_ids": input_ids})
            self._encoded = True

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.close()
        self._collected, self.patch_map, self._counts = _Collected(), None, []
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is None or not _has_pixels(kwargs):
            return
        mask = self._vision_mask
        vision = self._backbone.vision_mask(input_ids) if mask is None else mask.bool()
        self._counts = vision.sum(1).tolist()
        if not any(self._counts):
            return
        self.probing = True
        try:
            self.patch_map = find_patch_map(self._backbone, self._tower, self._digest, vision, args, kwargs)
        finally:
            self.probing = False
        self._install(self.patch_map)

    def _install(self, patch_map: PatchMap) -> None:
        family, needs = type(self._backbone.model).__name__, self._needs
        if needs.places and not patch_map.has_places:
            raise UnsupportedBackbone(
                f"{family}: the rows and columns of its vision tokens are unknown; use a scorer that needs none"
            )
        self._names, num_blocks = {}, len(self._tower.blocks)
        for name in sorted(needs.saliency):
            depth = name.removesuffix(RECEIVED)
            block = block_at(depth, patch_map.feeding, num_blocks, patch_map.cls is not None, patch_map.whole)
            if patch_map.positions[block] != patch_map.positions[patch_map.feeding]:
                raise UnsupportedBackbone(
                    f"{family}: its tower merges patches behind block {block}, so the attention there ({name}) "
                    "belongs to no vision token; use a scorer that reads the last blocks only"
                )
            self._names.setdefault(block, []).append(name)
        self._deep = block_at("deep", patch_map.feeding, num_blocks, False, patch_map.whole)
        blocks = set(self._names) | ({self._deep} if needs.keys else set())
        self._installed.enter_context(tapped_blocks(self._tower, blocks, self._on_attention))
        if needs.states:
            hook = self._tower.blocks[patch_map.feeding].register_forward_hook(self._on_states)
            self._installed.callback(hook.remove)

    def _on_states(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        states = (output[0] if isinstance(output, tuple) else output).detach()
        self._collected.states.append(states.reshape(-1, states.shape[-1]))

    def _on_attention(self, inputs: BlockAttention) -> None:
        assert self.patch_map is not None
        query, key = inputs.query.detach(), inputs.key.detach()
        if self._needs.keys and inputs.block == self._deep:
            self._collected.keys.append(key.float().mean(1).flatten(0, 1))
        made: dict[bool, Tensor] = {}
        for name in self._names.get(inputs.block, ()):
            of_cls = self.patch_map.cls is not None and not name.endswith(RECEIVED)
            if of_cls not in made:
                made[of_cls] = self._saliency(query, key, inputs, self.patch_map.cls if of_cls else None)
            self._collected.saliency.setdefault(name, []).append(made[of_cls])

    @staticmethod
    def _saliency(query: Tensor, key: Tensor, inputs: BlockAttention, cls: int | None) -> Tensor:
        """One number per position, float32 ``[positions]``."""
        if cls is None:
            return received_attention(query, key, inputs.mask, inputs.scaling, inputs.softcap).flatten()
        mask = inputs.mask
        if mask is not None and mask.dim() == 4 and mask.shape[2] > 1:
            mask = mask[:, :, cls : cls + 1]
        row = attention_of(query[:, :, cls : cls + 1], key, mask, inputs.scaling, inputs.softcap)
        return row.mean((1, 2)).flatten()

    # ---- results

    def statistics(self, vision_mask: Tensor, counts: Sequence[int] | None = None) -> TowerStatistics:
        """Statistics of the last prompt's vision tokens.

        Args:
            vision_mask: bool ``[batch, length]``.
            counts: vision tokens of each row; None reads them from the device.

        Raises:
            PruningError: the tower did not run for these vision tokens.
            UnsupportedBackbone: a block ran without its attention kernel.
        """
        device, patch_map = vision_mask.device, self.patch_map
        counts = vision_mask.sum(1).tolist() if counts is None else list(counts)
        if patch_map is None:
            if any(counts):
                raise PruningError(
                    "the vision tower did not run for this prompt; give pixels instead of embeddings, or use "
                    "a scorer that does not read the tower"
                )
            return self._empty(device)
        _, row, column, rows, columns, image, tile = patch_map.to(device)
        parts, needs = self._collected, self._needs
        statistics = TowerStatistics(
            saliency={
                name: self._per_token(parts.saliency.get(name, []), device) for name in sorted(needs.saliency)
            },
            states=self._per_token(parts.states, device) if needs.states else None,
            keys=self._per_token(parts.keys, device) if needs.keys else None,
            row=row,
            column=column,
            rows=rows,
            columns=columns,
            image=image,
            tile=tile,
            num_tiles=patch_map.num_tiles,
            largest_tile=patch_map.largest_tile,
            has_cls=patch_map.cls is not None,
        )
        return statistics if counts == self._counts else self._repeated(statistics, counts)

    def _repeated(self, statistics: TowerStatistics, counts: list[int]) -> TowerStatistics:
        """Statistics where `generate` repeats every row after the tower ran, for beams or several answers."""
        times = max(1, len(counts) // len(self._counts))
        if counts != [count for count in self._counts for _ in range(times)]:
            raise PruningError(
                f"the rows of the prompt have {counts} vision tokens, the vision tower made {self._counts}"
            )
        rows = torch.arange(sum(self._counts), device=statistics.row.device).split(self._counts)
        index = torch.cat([row for row in rows for _ in range(times)])
        number = torch.arange(times, device=index.device).repeat(len(rows))
        copy = torch.cat([number[row : row + 1].expand(count) for row, count in enumerate(counts)])
        image = statistics.image[index]
        return replace(
            statistics,
            saliency={name: values[index] for name, values in statistics.saliency.items()},
            states=None if statistics.states is None else statistics.states[index],
            keys=None if statistics.keys is None else statistics.keys[index],
            row=statistics.row[index],
            column=statistics.column[index],
            rows=statistics.rows[index],
            columns=statistics.columns[index],
            image=torch.where(image < 0, image, image * times + copy),
            tile=statistics.tile[index],
        )

    def _per_token(self, parts: list[Tensor], device: torch.device) -> Tensor:
        """Mean over each token's patches of values per position; ``parts`` follow one another."""
        assert self.patch_map is not None
        expected = self.patch_map.positions[self.patch_map.feeding]
        if (found := sum(map(len, parts))) != expected:
            raise UnsupportedBackbone(
                f"{type(self._backbone.model).__name__}: a block of {self._tower.path} passed {found} of {expected} "
                "positions through its attention kernel; use a scorer that does not read the tower"
            )
        return self.patch_map.mean(torch.cat(parts).float()).to(device)

    def _empty(self, device: torch.device) -> TowerStatistics:
        nothing, places = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.long, device=device)
        return TowerStatistics(
            saliency=dict.fromkeys(sorted(self._needs.saliency), nothing),
            states=nothing[:, None] if self._needs.states else None,
            keys=nothing[:, None] if self._needs.keys else None,
            row=places,
            column=places,
            rows=places,
            columns=places,
            image=places,
            tile=places,
            num_tiles=1,
            largest_tile=0,
            has_cls=False,
        )

    def close(self) -> None:
        """Leave the tower as it was."""
        self._installed.close()


def _has_pixels(kwargs: dict[str, Any]) -> bool:
    return any("pixel" in name and value is not None for name, value in kwargs.items())


_ENCODE = "_maybe_prepare_encoder_kwargs_for_generation"
"""The step of `generate` that runs the tower ahead of the model, in releases that do so. There is no public hook."""


@contextmanager
def _encoding_watched(model: PreTrainedModel, tap: TowerTap) -> Iterator[None]:
    encode = getattr(model, _ENCODE, None)
    if encode is None:
        yield
        return

    def watched(inputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tap.before_encoding(inputs, model_kwargs)
        return encode(inputs, model_kwargs, *args, **kwargs)

    own = vars(model).get(_ENCODE)
    vars(model)[_ENCODE] = watched
    try:
        yield
    finally:
        vars(model).pop(_ENCODE)
        if own is not None:
            vars(model)[_ENCODE] = own


@contextmanager
def tower_tap(backbone: Backbone, needs: TowerNeeds, vision_mask: Tensor | None = None) -> Iterator[TowerTap]:
    """Collect statistics of the vision tower in every forward with images; afterwards the model is unchanged.

    The first prompt of a shape runs the tower twice: once to find the patch map (see patch_map.py). The tower keeps its
    attention kernel.

    Args:
        backbone: the model and its parts.
        needs: what to collect.
        vision_mask: vision tokens of prompts, where they cannot be found by id, bool ``[batch, length]``.

    Yields:
        The `TowerTap`; call `TowerTap.statistics` inside or after a forward.

    Raises:
        UnsupportedBackbone: the model has no tower with attention; in a forward also: the tower's positions are no
            partition over the vision tokens.
    """
    tap = TowerTap(backbone, needs, vision_mask)
    with ExitStack() as undo:
        undo.callback(tap.close)
        # Before the hooks of `pruned`, which read the statistics.
        hook = backbone.model.register_forward_pre_hook(tap.before_model, with_kwargs=True, prepend=True)
        undo.callback(hook.remove)
        undo.enter_context(_encoding_watched(backbone.model, tap))
        yield tap
