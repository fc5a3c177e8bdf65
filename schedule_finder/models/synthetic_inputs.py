"""Prompts without a processor: random pixels and words of a given size, in the form each family takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pruning_runtime.backbone import Backbone
from schedule_finder.errors import InputError

DEFAULT_TEXT_TOKENS = 88
_BEFORE_IMAGE = 35 / 88
"""Share of the text before the image: LLaVA-1.5's system prompt in a prompt of 88 text tokens."""
_QWEN_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_DEFAULT_GRID_TOKENS = 576


def synthetic_inputs(
    backbone: Backbone,
    batch: int,
    num_vision: int | None = None,
    num_text: int = DEFAULT_TEXT_TOKENS,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A batch of equally long prompts with one image each, on the backbone's device.

    Random, and the same for the same arguments on every device.

    Args:
        backbone: whose inputs are made.
        batch: rows.
        num_vision: vision tokens of each row; None: those of one typical image (LLaVA-1.5 576,
            LLaVA-NeXT the largest image, 2928, Qwen-VL 576).
        num_text: all other tokens of each row.
        seed: of pixels and words.

    Returns:
        Tensors to call the model with, ``input_ids`` ``[batch, num_vision + num_text]`` among them.

    Raises:
        InputError: a family whose inputs are not known here, or a number of tokens that it cannot make.
    """
    config: Any = backbone.model.config
    generator = torch.Generator().manual_seed(seed)
    if backbone.model_type == "llava":
        tokens, media = _llava(config, batch, num_vision, generator)
    elif backbone.model_type == "llava_next":
        tokens, media = _llava_next(config, batch, num_vision, generator)
    elif backbone.model_type in _QWEN_FAMILIES:
        tokens, media = _qwen(config, batch, num_vision, generator)
    else:
        raise InputError(
            f"no inputs can be made for model_type {backbone.model_type!r}; known: llava, llava_next, "
            + ", ".join(_QWEN_FAMILIES)
        )
    fewest = 4  # a word and the start mark before the image, the end mark and a word after it
    if num_text < fewest:
        raise InputError(f"--text-tokens {num_text}: at least {fewest}")
    ids = _words(backbone, batch, tokens + num_text, generator)
    first = max(2, round(num_text * _BEFORE_IMAGE))
    ids[:, first : first + tokens] = config.image_token_id
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media}
    if backbone.model_type in _QWEN_FAMILIES:
        ids[:, first - 1], ids[:, first + tokens] = config.vision_start_token_id, config.vision_end_token_id
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
    parameter = next(backbone.model.parameters())
    return {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def _words(backbone: Backbone, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Random ids of ordinary words, ``[batch, length]``."""
    config: Any = backbone.model.config
    fields = ("vision_start_token_id", "vision_end_token_id")
    special = {*backbone.vision_token_ids, *(getattr(config, field, None) for field in fields)}
    plain = torch.tensor([token for token in range(3, backbone.shape.vocab_size) if token not in special])
    return plain[torch.randint(len(plain), (batch, length), generator=generator)]


def _llava(
    config: Any, batch: int, num_vision: int | None, generator: torch.Generator
) -> tuple[int, dict[str, Tensor]]:
    side: int = config.vision_config.image_size
    made = (side // config.vision_config.patch_size) ** 2
    if num_vision not in (None, made):
        raise InputError(f"--vision-tokens {num_vision}: an image of this backbone makes {made}")
    return made, {"pixel_values": torch.randn(batch, 3, side, side, generator=generator)}


def _llava_next(
    config: Any, batch: int, num_vision: int | None, generator: torch.Generator
) -> tuple[int, dict[str, Tensor]]:
    side: int = config.vision_config.image_size
    across = side // config.vision_config.patch_size
    sizes: dict[int, tuple[int, int]] = {}
    for height, width in config.image_grid_pinpoints:
        rows, columns = height // side * across, width // side * across
        # The whole image small, then its tiles with an image newline at the end of each row of patches.
        sizes.setdefault(across**2 + rows * (columns + 1), (height, width))
    wanted = max(sizes) if num_vision is None else num_vision
    if wanted not in sizes:
        raise InputError(
            f"--vision-tokens {num_vision}: whole images of this backbone make {', '.join(map(str, sorted(sizes)))}"
        )
    height, width = sizes[wanted]
    tiles = 1 + (height // side) * (width // side)
    return wanted, {
        "pixel_values": torch.randn(batch, tiles, 3, side, side, generator=generator),
        "image_sizes": torch.tensor([[height, width]] * batch),
    }


def _qwen(
    config: Any, batch: int, num_vision: int | None, generator: torch.Generator
) -> tuple[int, dict[str, Tensor]]:
    tokens = _DEFAULT_GRID_TOKENS if num_vision is None else num_vision
    if tokens < 1:
        raise InputError(f"--vision-tokens {tokens}: at least 1")
    vision = config.vision_config
    merge: int = vision.spatial_merge_size
    # As square as the number allows.
    rows = max(height for height in range(1, int(tokens**0.5) + 1) if tokens % height == 0)
    grid = (1, rows * merge, tokens // rows * merge)
    features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return tokens, {
        "pixel_values": torch.randn(batch * grid[1] * grid[2], features, generator=generator),
        "image_grid_thw": torch.tensor([grid] * batch),
    }
