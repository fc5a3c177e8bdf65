"""Pass queries and keys of chosen tower blocks to a callback, and run the tower's own attention kernel.

The modules of a chosen block get a copy of their configuration that names the tap; other blocks, and the tower's masks,
keep the configuration and so the kernel that the user chose. Towers that pack images into one sequence for a flash
kernel run the chosen blocks image by image, with the same kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pruning_runtime.attention_tap import attention_kernel
from pruning_runtime.errors import UnsupportedBackbone
from pruning_runtime.tower.blocks import VisionTower

_serial = count()


@dataclass(frozen=True, slots=True)
class BlockAttention:
    """Inputs of one attention call of a tower block: several sequences, or one image of a packed sequence.

    ``query`` is ``[batch, heads, length, head_dim]``, ``key`` ``[batch, kv_heads, length, head_dim]``, both after RoPE
    and un-repeated; ``mask`` is None, bool, additive, or key validity, as in `received_attention`.
    """

    block: int
    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None


@contextmanager
def tapped_blocks(
    tower: VisionTower, blocks: Collection[int], callback: Callable[[BlockAttention], None]
) -> Iterator[None]:
    """Call ``callback`` with the attention inputs of the tower's ``blocks``, before the kernel runs.

    Afterwards every module has the configuration that it had before, also after an exception.
    """
    block_of = {module: block for block in blocks for module in tower.blocks[block].modules()}
    own = {module: vars(module)["config"] for module in block_of if "config" in vars(module)}
    # The name must not contain the name of a kernel: transformers matches them as substrings.
    name = f"adaptinfer_tower_{next(_serial)}"

    def tapped(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        kernel = own[module]._attn_implementation or "eager"
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        softcap, mask = kwargs.get("softcap"), _readable(attention_mask)
        if mask is None and kernel != "eager" and _is_causal(module, kwargs.get("is_causal")):
            mask = torch.ones(1, 1, *[query.shape[2]] * 2, dtype=torch.bool, device=query.device).tril()
        for q, k in _unpacked(query, key, kwargs.get("cu_seq_lens_q")):
            callback(BlockAttention(block_of[module], q, k, mask, scaling, softcap))
        return attention_kernel(kernel, module)(module, query, key, value, attention_mask, *args, **kwargs)

    kernel = tower.config._attn_implementation or "eager"
    ALL_ATTENTION_FUNCTIONS[name] = tapped
    if kernel in ALL_MASK_ATTENTION_FUNCTIONS:  # for blocks that make their mask themselves
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    try:
        copies = {id(config): copy.copy(config) for config in own.values()}
        for config in copies.values():
            config._attn_implementation = {"": name}
        for module, config in own.items():
            vars(module)["config"] = copies[id(config)]
        yield
    finally:
        for module, config in own.items():
            vars(module)["config"] = config
        del ALL_ATTENTION_FUNCTIONS[name]
        # There is no public function to remove a registration.
        AttentionMaskInterface._global_mapping.pop(name, None)


def _unpacked(query: Tensor, key: Tensor, ends: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries and keys of each image that a flash kernel receives packed into one sequence."""
    if ends is None:
        yield query, key
        return
    lengths = ends.diff().tolist()
    yield from zip(query.split(lengths, dim=2), key.split(lengths, dim=2), strict=True)


def _is_causal(module: nn.Module, given: bool | None) -> bool:
    """Whether kernels run causally without a mask: one tower's do (Phi-4-multimodal's)."""
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _readable(mask: Any) -> Tensor | None:
    if mask is None or isinstance(mask, Tensor):
        return mask
    raise UnsupportedBackbone(
        f"the vision tower's masks are {type(mask).__name__}, which cannot be read; choose sdpa or eager for it"
    )
