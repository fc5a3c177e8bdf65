"""More stock model classes with random weights: LLaVA's and Qwen's later ones, GLM, InternVL and others.

Classes are looked up by name when a model is built, so that a transformers release without one of them
can say so. Image sizes vary from image to image where the family allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.tiny_models import (
    BOS,
    IMAGE,
    LAYERS,
    PAD,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    Inputs,
    _build,
    _qwen_ids,
    _text,
)

IMAGE_BREAK, IMAGE_END, VIDEO_START, VIDEO_END, COLUMN = 104, 105, 106, 107, 108
FRAMES = 3

Modality = Literal["image", "video"]
Block = list[int]
Media = Callable[[Sequence[int], torch.Generator], tuple[list[Block], Inputs]]
"""``media(per_row, generator)``: a block of token ids per image or video, in order, and the tensors."""


@dataclass(frozen=True)
class TinyFamilyA:
    """One family.

    ``m_rope``: its prompts say of which modality each token is. ``recurrent``: some layers carry a state
    along the sequence, so that dropping means compaction. ``vision_experts``: experts of their own for vision
    tokens, and for the ids in it, which stand around them.
    """

    class_name: str
    config: Callable[[], dict[str, Any]]
    image: Media
    video: Media | None = None
    m_rope: bool = False
    recurrent: bool = False
    vision_experts: tuple[int, ...] = ()

    @property
    def available(self) -> bool:
        """Whether this release of transformers has the class."""
        return hasattr(transformers, self.class_name)

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What a prompt may hold."""
        return ("image", "video") if self.video else ("image",)

    def build(self, *, seed: int = 0, attention: str = "sdpa") -> PreTrainedModel:
        """An instance in evaluation mode."""
        model_class = getattr(transformers, self.class_name)
        return _build(model_class, model_class.config_class(**self.config()), seed=seed, attention=attention)

    def batch(
        self,
        per_row: Sequence[int],
        *,
        modality: Modality = "image",
        padded: bool = True,
        seed: int = 0,
    ) -> Inputs:
        """Prompts; row ``i`` holds ``per_row[i]`` images or videos.

        Args:
            padded: pad on the left; else the text makes all rows equally long, so that no mask is needed.
        """
        generator = torch.Generator().manual_seed(seed)
        media = self.image if modality == "image" else self.video
        assert media is not None
        blocks, inputs = media(per_row, generator)
        left, rows = iter(blocks), []
        for row, count in enumerate(per_row):
            ids = [BOS, *_words(2, generator)]
            for _ in range(count):
                ids += [*next(left), *_words(1, generator)]
            rows.append(ids + _words(7 + 2 * row, generator))
        length = max(map(len, rows))
        if not padded:
            rows = [row + _words(length - len(row), generator) for row in rows]
        input_ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
        tokens = {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}
        if self.m_rope:
            seen = (input_ids == IMAGE) | (input_ids == VIDEO)
            tokens["mm_token_type_ids"] = seen.long() * (1 if modality == "image" else 2)
            if self.vision_experts:
                around = torch.isin(input_ids, torch.tensor(self.vision_experts))
                tokens["moe_mm_token_type_ids"] = (seen | around).long()
        return tokens | inputs


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, 100, (count,), generator=generator).tolist()


def _tower(**changes: Any) -> dict[str, Any]:
    """A vision transformer of two layers on 4 x 4 patches."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    } | changes


# ---- LLaVA's: an image is a thumbnail and a grid of tiles, with a newline after each row of patches.

_PINPOINTS = [[16, 32], [32, 16]]
_ANYRES_SIZES = ((16, 32), (32, 16), (16, 16))


def _anyres_tokens(size: tuple[int, int]) -> int:
    # 16 of the thumbnail; then the tiles' patches without those of the padding, a newline per row of them.
    rows, columns = {(16, 32): (4, 8), (32, 16): (8, 4), (16, 16): (4, 4)}[size]
    return 16 + rows * (columns + 1)


def _anyres_images(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    sizes = [_ANYRES_SIZES[i % 3] for i in range(sum(per_row))]
    pixels = torch.randn(len(sizes), 3, 3, 16, 16, generator=generator)
    blocks = [[IMAGE] * _anyres_tokens(size) for size in sizes]
    return blocks, {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def _llava_next() -> dict[str, Any]:
    return {
        "vision_config": _tower(model_type="clip_vision_model", projection_dim=32),
        "text_config": _text(model_type="llama"),
        "image_token_index": IMAGE,
        "image_grid_pinpoints": _PINPOINTS,
    }


def _llava_next_video() -> dict[str, Any]:
    return _llava_next() | {"video_token_index": VIDEO}


def _pooled_videos(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    videos = sum(per_row)
    pixels = torch.randn(videos, FRAMES, 3, 16, 16, generator=generator)
    return [[VIDEO] * 4 * FRAMES] * videos, {"pixel_values_videos": pixels}


def _llava_onevision() -> dict[str, Any]:
    return {
        "vision_config": _tower(model_type="siglip_vision_model", vision_use_head=False),
        "text_config": _text(model_type="qwen2"),
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": _PINPOINTS,
    }


def _onevision_images(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    # Only the image of a row that has no other is cut into tiles.
    blocks, inputs = _anyres_images(per_row, generator)
    alone = [count == 1 for count in per_row for _ in range(count)]
    blocks = [block if tiles else [IMAGE] * 17 for block, tiles in zip(blocks, alone, strict=True)]
    return blocks, inputs | {"batch_num_images": torch.tensor(per_row)}


def _onevision_videos(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    blocks, inputs = _pooled_videos(per_row, generator)
    return [[*block, VIDEO] for block in blocks], inputs


# ---- Granite 4 Vision: as LLaVA-NeXT, but nothing enters with the embeddings; windows of 4 x 4 patches become
# 2 x 2 tokens, from four layers of the tower and from four corners of 2 x 2 patches, each for a decoder layer.


def _granite4_vision() -> dict[str, Any]:
    qformer = {
        "model_type": "blip_2_qformer",
        # As wide as the tower, which later releases of transformers see to themselves.
        "hidden_size": 64,
        "encoder_hidden_size": 64,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "intermediate_size": 48,
        "cross_attention_frequency": 1,
        "use_qformer_text_input": False,
    }
    return {
        "vision_config": _tower(
            model_type="siglip_vision_model",
            hidden_size=64,  # a head of the projectors is 64 wide
            image_size=32,
            num_hidden_layers=3,
            vision_use_head=False,
        ),
        "text_config": _text(
            model_type="granite4_vision_text",
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            attention_multiplier=0.3,
            logits_scaling=0.5,
        ),
        "qformer_config": qformer,
        "image_token_index": IMAGE,
        "image_grid_pinpoints": [[32, 64], [64, 32]],
        "vision_feature_select_strategy": "full",
        "downsample_rate": "2/4",
        "deepstack_layer_map": [[-1, 0], [-3, 1]],
        "spatial_vision_layer": -2,
        # Two of them behind the last stage of the tests' schedules.
        "spatial_target_layers": [2, 3, 4, 5],
    }


def _granite_images(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    blocks, inputs = _anyres_images(per_row, generator)
    pixels = torch.randn(len(blocks), 3, 3, 32, 32, generator=generator)
    return blocks, {"pixel_values": pixels, "image_sizes": inputs["image_sizes"] * 2}


# ---- Qwen's: images in their own resolution, given as a grid of patches of which 2 x 2 become a token.

_GRIDS = ((8, 8), (4, 8), (8, 4))


def _patches(grids: Tensor, patch: int, generator: torch.Generator) -> Tensor:
    # Each patch is two frames of `patch` x `patch` pixels.
    return torch.randn(int(grids.prod(1).sum()), 3 * 2 * patch * patch, generator=generator)


def _grid_images(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    grids = torch.tensor([[1, *_GRIDS[i % 3]] for i in range(sum(per_row))])
    blocks = [[VISION_START, *[IMAGE] * (int(grid.prod()) // 4), VISION_END] for grid in grids]
    return blocks, {"pixel_values": _patches(grids, 4, generator), "image_grid_thw": grids}


def _video_grids(per_row: Sequence[int]) -> Tensor:
    return torch.tensor([[FRAMES - i % 2, *_GRIDS[(i + 1) % 3]] for i in range(sum(per_row))])


def _timed_videos(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    """Every frame stands for itself behind its time of day, which is text."""
    grids = _video_grids(per_row)
    blocks = []
    for frames, height, width in grids.tolist():
        frame = [VISION_START, *[VIDEO] * (height * width // 4), VISION_END]
        blocks.append([token for _ in range(frames) for token in [*_words(2, generator), *frame]])
    return blocks, {"pixel_values_videos": _patches(grids, 4, generator), "video_grid_thw": grids}


def _rope(**changes: Any) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4} | changes


def _qwen_tower(**changes: Any) -> dict[str, Any]:
    return {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 48,
        "patch_size": 4,
        "num_position_embeddings": 64,
    } | changes


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _qwen3_vl(**text: Any) -> dict[str, Any]:
    # Features of all three tower layers come in after decoder layers 0, 1 and 2.
    return {
        "vision_config": _qwen_tower(deepstack_visual_indexes=[0, 1, 2]),
        "text_config": _text(head_dim=8, rope_parameters=_rope(mrope_interleaved=True), **text),
        **_qwen_ids(),
    }


def _qwen3_5_text(**text: Any) -> dict[str, Any]:
    return _text(
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        rope_parameters=_rope(mrope_interleaved=True, partial_rotary_factor=0.5),
        # With random weights a linear-attention head's output can be so small that its norm blows rounding
        # up; a larger epsilon keeps the model's own float32 noise small.
        rms_norm_eps=1e-2,
        layer_types=["linear_attention", "full_attention"] * (LAYERS // 2),
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        **text,
    )


def _qwen3_5(**text: Any) -> dict[str, Any]:
    return {"vision_config": _qwen_tower(), "text_config": _qwen3_5_text(**text), **_qwen_ids()}


# ---- Ernie 4.5 VL: as Qwen's, but patches are single frames, and pairs of frames merge behind the tower.


def _ernie4_5_vl_moe() -> dict[str, Any]:
    tower = _qwen_tower(depth=2)
    del tower["num_position_embeddings"], tower["out_hidden_size"]
    return {
        "vision_config": tower,
        "text_config": _text(
            moe_intermediate_size=[32, 24],
            moe_k=2,
            moe_num_experts=4,
            moe_num_shared_experts=1,
            rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        ),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": VISION_START,
        "image_end_token_id": VISION_END,
        "video_start_token_id": VIDEO_START,
        "video_end_token_id": VIDEO_END,
    }


def _frame_images(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    blocks, inputs = _grid_images(per_row, generator)
    return blocks, inputs | {"pixel_values": inputs["pixel_values"][:, : 3 * 4 * 4]}


def _frame_videos(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    grids = torch.tensor([[(4, 2)[i % 2], *_GRIDS[(i + 1) % 3]] for i in range(sum(per_row))])
    blocks = [[VIDEO_START, *[VIDEO] * (int(grid.prod()) // 8), VIDEO_END] for grid in grids]
    patches = _patches(grids, 4, generator)[:, : 3 * 4 * 4]
    return blocks, {"pixel_values_videos": patches, "video_grid_thw": grids}


# ---- GLM-4V: as Qwen's, but frames of a video use the image's token.


def _glm_videos(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    grids = _video_grids(per_row)
    blocks = []
    for frames, height, width in grids.tolist():
        frame = [VISION_START, *[IMAGE] * (height * width // 4), VISION_END]
        inside = [token for _ in range(frames) for token in [*frame, *_words(1, generator)]]
        blocks.append([VIDEO_START, *inside, VIDEO_END])
    return blocks, {"pixel_values_videos": _patches(grids, 4, generator), "video_grid_thw": grids}


def _glm4v(**text: Any) -> dict[str, Any]:
    tower = _qwen_tower(depth=2, image_size=32)
    del tower["num_position_embeddings"]
    return {
        "vision_config": tower,
        "text_config": _text(
            num_attention_heads=3,
            num_key_value_heads=1,
            rope_parameters=_rope(partial_rotary_factor=0.5),
            **text,
        ),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": VISION_START,
        "image_end_token_id": VISION_END,
        "video_start_token_id": VIDEO_START,
        "video_end_token_id": VIDEO_END,
    }


def _glm4v_moe() -> dict[str, Any]:
    return _glm4v(
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        head_dim=16,
    )


# ---- Others


def _square_images(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    images = sum(per_row)
    pixels = torch.randn(images, 3, 16, 16, generator=generator)
    return [[IMAGE] * 16] * images, {"pixel_values": pixels}


def _internvl() -> dict[str, Any]:
    return {
        "vision_config": _tower(image_size=[16, 16], patch_size=[2, 2]),
        "text_config": _text(model_type="qwen2"),
        "image_token_id": IMAGE,
        "image_seq_length": 16,
    }


def _idefics3() -> dict[str, Any]:
    return {
        "vision_config": _tower(patch_size=2),
        "text_config": _text(model_type="llama"),
        "image_token_id": IMAGE,
        "pad_token_id": PAD,
        "scale_factor": 2,
    }


def _slotted_images(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    """``[rows, most images of a row, ...]``; the places of absent images are zero."""
    pixels = torch.zeros(len(per_row), max(per_row), 3, 16, 16)
    real = torch.zeros(len(per_row), max(per_row), 16, 16, dtype=torch.long)
    for row, count in enumerate(per_row):
        pixels[row, :count] = torch.randn(count, 3, 16, 16, generator=generator)
        real[row, :count] = 1
    blocks = [[VISION_START, *[IMAGE] * 16, VISION_END]] * sum(per_row)
    return blocks, {"pixel_values": pixels, "pixel_attention_mask": real}


def _aya_vision() -> dict[str, Any]:
    return {
        "vision_config": _tower(model_type="siglip_vision_model", patch_size=2, vision_use_head=False),
        "text_config": _text(
            model_type="cohere2",
            layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
            sliding_window=12,
            logit_scale=1.0,
        ),
        "image_token_index": IMAGE,
    }


def _cohere2_vision() -> dict[str, Any]:
    return {
        "vision_config": _tower(model_type="siglip_vision_model", vision_use_head=False),
        "text_config": _text(
            model_type="cohere2",
            layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
            sliding_window=12,
            logit_scale=1.0,
        ),
        "image_token_id": IMAGE,
        "alignment_intermediate_size": 64,
    }


def _tiled_images(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    """One to three tiles an image, each followed by a break token, which is text."""
    tiles = [1 + (i + 1) % 3 for i in range(sum(per_row))]
    pixels = torch.randn(sum(tiles), 3, 16, 16, generator=generator)
    blocks = [[VISION_START, *[*[IMAGE] * 4, IMAGE_BREAK] * count, VISION_END] for count in tiles]
    return blocks, {"pixel_values": pixels}


_OVIS_INDICATORS = [VISION_START, VISION_END, IMAGE_BREAK, IMAGE_END, COLUMN]
"""Start, end of an image's overview, column, row, end: text ids, whose vectors come from the vision side."""


def _ovis2() -> dict[str, Any]:
    return {
        "vision_config": _tower(hidden_stride=2, vocab_size=40, num_visual_indicator_tokens=5),
        "text_config": _text(model_type="qwen2"),
        "image_token_id": IMAGE,
        "visual_indicator_token_ids": _OVIS_INDICATORS,
        "hidden_size": 48,
        "vocab_size": VOCAB,
    }


def _ovis_images(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    """An overview, and the same in 1 x 2 or 2 x 1 tiles where the image is not square."""
    start, overview, column, row, end = _OVIS_INDICATORS
    tile, blocks, tiles = [IMAGE] * 4, [], 0
    for image in range(sum(per_row)):
        parts = ([*tile, column, *tile], [*tile, row, *tile], [])[image % 3]
        blocks.append([start, *tile, overview, *parts, end])
        tiles += 1 + parts.count(IMAGE) // len(tile)
    return blocks, {"pixel_values": torch.randn(tiles, 3, 16, 16, generator=generator)}


def _deepseek_vl() -> dict[str, Any]:
    return {
        "vision_config": _tower(model_type="siglip_vision_model", vision_use_head=False),
        "text_config": _text(model_type="llama"),
        "image_token_id": IMAGE,
    }


def _mistral3() -> dict[str, Any]:
    return {
        "vision_config": _tower(model_type="pixtral", image_size=48, head_dim=8),
        "text_config": _text(model_type="mistral", head_dim=8, sliding_window=None),
        "image_token_index": IMAGE,
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    }


def _pixtral_images(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    """Rows of an image end with a break token, which is text."""
    sizes = [((32, 32), (16, 48), (24, 32))[i % 3] for i in range(sum(per_row))]
    pixels = torch.zeros(len(sizes), 3, 32, 48)
    blocks = []
    for image, (height, width) in enumerate(sizes):
        pixels[image, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        lines = ([IMAGE] * (width // 8) + [IMAGE_BREAK]) * (height // 8)
        blocks.append([*lines[:-1], IMAGE_END])
    return blocks, {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def _minicpm() -> dict[str, Any]:
    return {
        "vision_config": _tower(image_size=64),
        "text_config": _qwen3_5_text(model_type="qwen3_5_text"),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "insert_layer_id": 0,
    }


def _packed(sizes: Sequence[tuple[int, int]], generator: torch.Generator) -> Tensor:
    """All patches of all images in one line of pixels."""
    return torch.randn(1, 3, 4, 4 * sum(h * w for h, w in sizes), generator=generator)


def _packed_images(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    # All of one size: the tower of transformers 5.17 takes the first image's size for every image.
    sizes = [(12, 16)] * sum(per_row)
    blocks = [[VISION_START, *[IMAGE] * (h * w // 16), VISION_END] for h, w in sizes]
    return blocks, {"pixel_values": _packed(sizes, generator), "target_sizes": torch.tensor(sizes)}


def _packed_videos(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    sizes = [(8, 16)] * FRAMES * sum(per_row)
    frame = [VISION_START, *[VIDEO] * 8, VISION_END]
    tensors = {
        "pixel_values_videos": _packed(sizes, generator),
        "target_sizes_videos": torch.tensor(sizes),
    }
    return [frame * FRAMES] * sum(per_row), tensors


def _lfm2_vl() -> dict[str, Any]:
    tower = _tower(model_type="siglip2_vision_model", num_patches=64, vision_use_head=False)
    del tower["image_size"]
    return {
        "vision_config": tower,
        "text_config": _text(
            model_type="lfm2",
            layer_types=["conv", "full_attention"] * (LAYERS // 2),
            block_auto_adjust_ff_dim=False,
        ),
        "image_token_id": IMAGE,
        "projector_hidden_size": 64,
        "tie_word_embeddings": False,
    }


def _padded_patches(per_row: Sequence[int], generator: torch.Generator) -> tuple[list[Block], Inputs]:
    shapes = [((8, 8), (4, 12), (6, 8))[i % 3] for i in range(sum(per_row))]
    pixels = torch.randn(len(shapes), 64, 3 * 4 * 4, generator=generator)
    real = torch.tensor([[1] * (h * w) + [0] * (64 - h * w) for h, w in shapes])
    tensors = {
        "pixel_values": pixels * real[..., None],
        "pixel_attention_mask": real,
        "spatial_shapes": torch.tensor(shapes),
    }
    return [[VISION_START, *[IMAGE] * (h * w // 4), VISION_END] for h, w in shapes], tensors


FAMILIES_A: dict[str, TinyFamilyA] = {
    "llava_next": TinyFamilyA("LlavaNextForConditionalGeneration", _llava_next, _anyres_images),
    "llava_onevision": TinyFamilyA(
        "LlavaOnevisionForConditionalGeneration", _llava_onevision, _onevision_images, _onevision_videos
    ),
    "llava_next_video": TinyFamilyA(
        "LlavaNextVideoForConditionalGeneration", _llava_next_video, _anyres_images, _pooled_videos
    ),
    "granite4_vision": TinyFamilyA(
        "Granite4VisionForConditionalGeneration", _granite4_vision, _granite_images
    ),
    "qwen3_vl": TinyFamilyA(
        "Qwen3VLForConditionalGeneration", _qwen3_vl, _grid_images, _timed_videos, m_rope=True
    ),
    "qwen3_vl_moe": TinyFamilyA(
        "Qwen3VLMoeForConditionalGeneration",
        lambda: _qwen3_vl(**_EXPERTS),
        _grid_images,
        _timed_videos,
        m_rope=True,
    ),
    "qwen3_5": TinyFamilyA(
        "Qwen3_5ForConditionalGeneration", _qwen3_5, _grid_images, _timed_videos, m_rope=True, recurrent=True
    ),
    "qwen3_5_moe": TinyFamilyA(
        "Qwen3_5MoeForConditionalGeneration",
        lambda: _qwen3_5(**_EXPERTS, shared_expert_intermediate_size=32),
        _grid_images,
        _timed_videos,
        m_rope=True,
        recurrent=True,
    ),
    "internvl": TinyFamilyA("InternVLForConditionalGeneration", _internvl, _square_images),
    "glm4v": TinyFamilyA("Glm4vForConditionalGeneration", _glm4v, _grid_images, _glm_videos, m_rope=True),
    "glm46v": TinyFamilyA("Glm46VForConditionalGeneration", _glm4v, _grid_images, _glm_videos, m_rope=True),
    "glm4v_moe": TinyFamilyA(
        "Glm4vMoeForConditionalGeneration", _glm4v_moe, _grid_images, _glm_videos, m_rope=True
    ),
    "ernie4_5_vl_moe": TinyFamilyA(
        "Ernie4_5_VLMoeForConditionalGeneration",
        _ernie4_5_vl_moe,
        _frame_images,
        _frame_videos,
        m_rope=True,
        vision_experts=(VISION_START, VISION_END, VIDEO_START, VIDEO_END),
    ),
    "idefics3": TinyFamilyA("Idefics3ForConditionalGeneration", _idefics3, _slotted_images),
    "smolvlm": TinyFamilyA("SmolVLMForConditionalGeneration", _idefics3, _slotted_images),
    "aya_vision": TinyFamilyA("AyaVisionForConditionalGeneration", _aya_vision, _square_images),
    "cohere2_vision": TinyFamilyA("Cohere2VisionForConditionalGeneration", _cohere2_vision, _tiled_images),
    "ovis2": TinyFamilyA("Ovis2ForConditionalGeneration", _ovis2, _ovis_images),
    "deepseek_vl": TinyFamilyA("DeepseekVLForConditionalGeneration", _deepseek_vl, _square_images),
    "mistral3": TinyFamilyA("Mistral3ForConditionalGeneration", _mistral3, _pixtral_images),
    "minicpmv4_6": TinyFamilyA(
        "MiniCPMV4_6ForConditionalGeneration", _minicpm, _packed_images, _packed_videos, recurrent=True
    ),
    "lfm2_vl": TinyFamilyA("Lfm2VlForConditionalGeneration", _lfm2_vl, _padded_patches, recurrent=True),
}
"""Idefics3's and SmolVLM's videos are images to the model: their processors spell them as frames."""
