"""Stock model classes with random weights, built in-process from small configurations.

A `TinyFamily` also makes batches: rows with different numbers of images, padded on the left, in the
exact form that the family's processor would give.
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

    def batch(
        self, images_per_row: Sequence[int] = (1,), *, text: Sequence[int] | None = None, seed: int = 0
    ) -> Inputs:
        """Left-padded prompts; row ``i`` holds ``images_per_row[i]`` images and ``text[i]`` text tokens."""
        generator = torch.Generator().manual_seed(seed)
        text = text or [7 + 2 * row for row in range(len(images_per_row))]
        rows = []
        for images, words in zip(images_per_row, text, strict=True):
            ids = [BOS, *self._words(2, generator)]
            for _ in range(images):
                ids += [*self.image_block, *self._words(1, generator)]
            rows.append(ids + self._words(words, generator))
        length = max(map(len, rows))
        input_ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
        inputs = {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}
        if sum(images_per_row):
            inputs |= self.image_inputs(sum(images_per_row), generator)
            if "image_grid_thw" in inputs:
                inputs["mm_token_type_ids"] = (input_ids == IMAGE).long()
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


_qwen_block = (VISION_START, *[IMAGE] * IMAGE_TOKENS, VISION_END)

FAMILIES: dict[str, TinyFamily] = {
    "llava": TinyFamily(build_llava, _llava_images, (IMAGE,) * IMAGE_TOKENS),
    "qwen2_vl": TinyFamily(build_qwen2_vl, _qwen_images, _qwen_block),
    "qwen2_5_vl": TinyFamily(build_qwen2_5_vl, _qwen_images, _qwen_block),
}
