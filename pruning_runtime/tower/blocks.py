"""Find the transformer blocks of a model's vision tower, and name blocks by depth. No table of families."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pruning_runtime.backbone import Backbone
from pruning_runtime.errors import UnsupportedBackbone

_OTHER_SENSES = ("audio", "speech")
"""Towers of other inputs than images, by their path in the model."""
_SHALLOW, _MIDDLE_WITH_CLS, _MIDDLE = 1 / 4, 3 / 8, 1 / 2
"""Depth of the named blocks as a share of the number of blocks; see `block_at`."""


@dataclass(frozen=True)
class VisionTower:
    """The transformer blocks of a vision tower.

    Attributes:
        blocks: in the order in which they run.
        path: of the list of blocks in the model.
        config: configuration of the model that owns the blocks.
    """

    blocks: nn.ModuleList
    path: str
    config: PreTrainedConfig


def find_tower(backbone: Backbone) -> VisionTower:
    """The longest list of attention blocks outside the decoder's layers; of two such lists, the first.

    A list whose items contain lists of attention blocks themselves is not a list of blocks. Raises
    `UnsupportedBackbone` for a model without such a list, for example one with a convolutional tower.
    """
    decoder = set(backbone.layers.modules())
    found = [
        (path, module)
        for path, module in backbone.model.named_modules()
        if module not in decoder
        and _is_block_list(module)
        and not any(word in path for word in _OTHER_SENSES)
    ]
    if not found:
        raise UnsupportedBackbone(
            f"{type(backbone.model).__name__} has no vision tower with attention blocks; "
            "use a scorer that does not read the tower"
        )
    path, blocks = max(found, key=lambda pair: len(pair[1]))
    assert isinstance(blocks, nn.ModuleList)
    return VisionTower(blocks, path, _owner(backbone.model, path).config)


def block_at(depth: str, feeding: int, num_blocks: int, has_cls: bool, whole: Collection[int]) -> int:
    """The block that a rule means by ``shallow``, ``middle`` or ``deep``.

    ``deep`` is the block that feeds the decoder. Counted from 1, ``shallow`` is at a quarter of the depth, and
    ``middle`` at three eighths with a CLS token and at half without. These shares give the blocks that the rules'
    authors use (from 0): CLIP-L with 24 blocks 5, 8 and -2, Qwen2.5-VL with 32 blocks 7, 15 and 31.

    In windowed towers, ``deep`` moves back and the others forward to the next block that sees whole images.

    Args:
        depth: ``shallow``, ``middle`` or ``deep``.
        feeding: the block that feeds the decoder.
        num_blocks: of the tower.
        has_cls: whether the tower has a CLS token.
        whole: blocks whose attention spans whole images; at least one is not after ``feeding``.
    """
    usable = sorted(block for block in whole if block <= feeding)
    if depth == "deep":
        return usable[-1]
    share = _SHALLOW if depth == "shallow" else _MIDDLE_WITH_CLS if has_cls else _MIDDLE
    wanted = max(0, round(share * num_blocks) - 1)
    return next((block for block in usable if block >= wanted), usable[-1])


def _is_block_list(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or not len(module):
        return False
    inside = list(module[0].modules())
    attends = any("attn" in name or "attention" in name for name, _ in module[0].named_modules())
    return attends and not any(_is_block_list(inner) for inner in inside)


def _owner(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The innermost pretrained model on the way to ``path``."""
    owner, names = model, path.split(".")
    for depth in range(1, len(names)):
        module = model.get_submodule(".".join(names[:depth]))
        if isinstance(module, PreTrainedModel):
            owner = module
    return owner
