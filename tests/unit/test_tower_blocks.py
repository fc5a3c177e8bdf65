"""Names of blocks by depth, and saliency from queries and keys, without a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pruning_runtime.tower.blocks import block_at
from pruning_runtime.tower.received import received_attention
from pruning_runtime.tower.tap import TowerNeeds


@pytest.mark.parametrize(
    ("num_blocks", "feeding", "has_cls", "whole", "expected"),
    [
        (24, 22, True, range(23), {"shallow": 5, "middle": 8, "deep": 22}),  # CLIP-L
        (32, 31, False, (7, 15, 23, 31), {"shallow": 7, "middle": 15, "deep": 31}),  # Qwen2.5-VL
        (16, 15, False, range(16), {"middle": 7, "deep": 15}),  # Gemma 4
        (1, 0, False, (0,), {"shallow": 0, "middle": 0, "deep": 0}),
        (8, 7, False, (2, 5), {"shallow": 2, "middle": 5, "deep": 5}),
        (8, 3, False, range(8), {"middle": 3, "deep": 3}),
    ],
)
def test_blocks_by_depth(
    num_blocks: int, feeding: int, has_cls: bool, whole, expected: dict[str, int]
) -> None:
    assert {name: block_at(name, feeding, num_blocks, has_cls, whole) for name in expected} == expected


def reference(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """The mean over heads and over queries that can attend to a key, in float64 from the whole map."""
    batch, heads, length, _ = query.shape
    key = key.double().repeat_interleave(heads // key.shape[1], 1)
    logits = query.double() @ key.transpose(-1, -2) * scaling
    seen = (
        torch.ones(batch, length, length, dtype=torch.bool)
        if mask is None
        else mask.expand(batch, -1, length, -1)[:, 0]
    )
    maps = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num(0).mean(1)
    counted = seen & seen.any(1)[:, :, None]
    return (maps * counted).sum(1) / counted.sum(1).clamp(min=1)


def draw(batch: int = 2, heads: int = 4, kv_heads: int = 2, length: int = 37) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, heads, length, 8, generator=generator),
        torch.randn(batch, kv_heads, length, 8, generator=generator),
    )


@pytest.mark.parametrize("form", ["none", "padding", "keys", "blocks", "one row"])
@pytest.mark.parametrize("additive", [False, True])
def test_received_attention(form: str, additive: bool) -> None:
    query, key = draw()
    number = torch.arange(37)
    valid = number < torch.tensor([37, 20])[:, None]
    full = {
        "none": None,
        "padding": (valid[:, None] & valid[:, :, None])[:, None],
        "keys": valid[:, None, None].expand(2, 1, 37, 37),
        "blocks": ((number < 20)[:, None] == (number < 20))[None, None],
        "one row": valid[:, None, None],
    }[form]
    expected = reference(query, key, full, 0.3)
    given = full
    if additive and full is not None:
        given = torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float32).min)
    found = received_attention(query, key, given, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    if form == "one row" and not additive:
        torch.testing.assert_close(received_attention(query, key, valid, 0.3), found)


def test_no_map_of_positions_by_positions_is_made() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            if isinstance(output, Tensor):
                largest = max(largest, output.numel())
            return output

    query, key = draw(batch=1, heads=8, kv_heads=8, length=1024)
    with Watch():
        received_attention(query, key, None, 0.3)
    assert largest <= 1024 * 1024 // 4  # 1 MiB of float32, or the keys; a map has 8 million entries


def test_unknown_saliency_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown saliency \\['deepest'\\]"):
        TowerNeeds(frozenset({"deepest"}))
