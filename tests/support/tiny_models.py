"""Stock model classes with random weights, built in-process from small configurations.

A `TinyFamily` also makes batches: rows with different numbers of images and videos, padded on the left, in
the exact form that the family's processor would give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

VOCAB = 120
PAD, BOS, EOS = 0, 1, 2
IMAGE, VIDEO, VISION_START, VISION_END = 100, 101, 102, 103
IMAGE_TOKENS = 16
LAYERS = 6

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class TinyFamily:
    """One family: how to build it, and how to make its inputs from images per row."""

    build: Callable[..., PreTrainedModel]
    image_inputs: Callable[[int, torch.Generator], Inputs]
    image_block: tuple[int, ...]
    """Token ids that stand for one image."""
    videos: Callable[[int, torch.Generator], tuple[list[list[int]], Inputs]] | None = None
    """``videos(count, generator)``: token ids of each video, which may differ in size, and the tensors."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a prompt may hold."""
        return ("image", "video") if self.videos else ("image",)

    def batch(
        self,
        images_per_row: Sequence[int] = (1,),
        *,
        videos_per_row: Sequence[int] | None = None,
        text: Sequence[int] | None = None,
        seed: int = 0,
    ) -> Inputs:
        """Left-padded prompts.

        Row ``i`` holds ``images_per_row[i]`` images, ``videos_per_row[i]`` videos and ``text[i]`` text tokens.
        """
        generator = torch.Generator().manual_seed(seed)
        text = text or [7 + 2 * row for row in range(len(images_per_row))]
        videos_per_row = videos_per_row or [0] * len(images_per_row)
        blocks, video_inputs = [], {}
        if sum(videos_per_row):
            assert self.videos is not None
            blocks, video_inputs = self.videos(sum(videos_per_row), generator)
        left, rows = iter(blocks), []
        for images, videos, words in zip(images_per_row, videos_per_row, text, strict=True):
            ids = [BOS, *self._words(2, generator)]
            for block in [self.image_block] * images + [next(left) for _ in range(videos)]:
                ids += [*block, *self._words(1, generator)]
            rows.append(ids + self._words(words, generator))
        length = max(map(len, rows))
        input_ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
        inputs = {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}
        if sum(images_per_row):
            inputs |= self.image_inputs(sum(images_per_row), generator)
        inputs |= video_inputs
        if "image_grid_thw" in inputs or "video_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (input_ids == IMAGE).long() + 2 * (input_ids == VIDEO).long()
        return inputs

    @staticmethod
    def _words(count: int, generator: torch.Generator) -> list[int]:
        return torch.randint(3, 100, (count,), generator=generator).tolist()


def _build(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, *, seed: int, attention: str
) -> PreTrainedModel:
    """Random weights large enough for attention to be far from uniform."""
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
    return model.eval()


def _text(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    } | changes


def build_llava(*, seed: int = 0, attention: str = "sdpa", **text: Any) -> PreTrainedModel:
    """LLaVA: CLIP tower, 16 vision tokens an image, Llama decoder with grouped-query attention."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_text(**text)),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    return _build(LlavaForConditionalGeneration, config, seed=seed, attention=attention)


def _llava_images(count: int, generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator)}


def _qwen_text(**text: Any) -> dict[str, Any]:
    return _text(
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}, **text
    )


def _qwen_ids() -> dict[str, int]:
    return {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }


def build_qwen2_vl(*, seed: int = 0, attention: str = "sdpa", **text: Any) -> PreTrainedModel:
    """Qwen2-VL: M-RoPE, dynamic resolution."""
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 4, "hidden_size": 48, "patch_size": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(vision_config=vision, text_config=_qwen_text(**text), **_qwen_ids())
    return _build(Qwen2VLForConditionalGeneration, config, seed=seed, attention=attention)


def build_qwen2_5_vl(*, seed: int = 0, attention: str = "sdpa", **text: Any) -> PreTrainedModel:
    """Qwen2.5-VL: as Qwen2-VL with a windowed tower."""
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 48,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=_qwen_text(**text), **_qwen_ids())
    return _build(Qwen2_5_VLForConditionalGeneration, config, seed=seed, attention=attention)


def _qwen_images(count: int, generator: torch.Generator) -> Inputs:
    # An 8 x 8 grid of patches merges 2 x 2 into 16 vision tokens.
    return {
        "pixel_values": torch.randn(count * 64, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * count),
    }


def _qwen2_videos(count: int, generator: torch.Generator) -> tuple[list[list[int]], Inputs]:
    # Pairs of frames, height and width in patches; 2 x 2 patches of a pair of frames merge into a token.
    grids = torch.tensor([((3, 4, 8), (2, 8, 4))[video % 2] for video in range(count)])
    blocks = [[VISION_START, *[VIDEO] * (int(grid.prod()) // 4), VISION_END] for grid in grids]
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator)
    return blocks, {"pixel_values_videos": pixels, "video_grid_thw": grids}


def _qwen2_5_videos(count: int, generator: torch.Generator) -> tuple[list[list[int]], Inputs]:
    # Four positions a second: pairs of frames of the two kinds of videos stand six and two positions apart.
    blocks, inputs = _qwen2_videos(count, generator)
    seconds = torch.tensor([(1.5, 0.5)[video % 2] for video in range(count)])
    return blocks, inputs | {"second_per_grid_ts": seconds}


_qwen_block = (VISION_START, *[IMAGE] * IMAGE_TOKENS, VISION_END)

FAMILIES: dict[str, TinyFamily] = {
    "llava": TinyFamily(build_llava, _llava_images, (IMAGE,) * IMAGE_TOKENS),
    "qwen2_vl": TinyFamily(build_qwen2_vl, _qwen_images, _qwen_block, _qwen2_videos),
    "qwen2_5_vl": TinyFamily(build_qwen2_5_vl, _qwen_images, _qwen_block, _qwen2_5_videos),
}
