"""Checkpoint folders of small models that take videos, with the processors of their families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_folder import TEMPLATE, tokenizer
from tests.support.tiny_models import IMAGE, VIDEO, VISION_END, VISION_START, build_qwen2_5_vl

_SIDE = {"height": 16, "width": 16}
_PIXELS: dict[str, Any] = {"size": _SIDE, "crop_size": _SIDE, "do_center_crop": False}
_PINPOINTS = [[16, 32], [32, 16]]


def _qwen2_5_vl() -> tuple[PreTrainedModel, Any]:
    special = {
        "<|image_pad|>": IMAGE,
        "<|video_pad|>": VIDEO,
        "<|vision_start|>": VISION_START,
        "<|vision_end|>": VISION_END,
    }
    pixels = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 64 * 16}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer(special),
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>").replace(
            "VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"
        ),
    )
    return build_qwen2_5_vl(), processor


def _llava_onevision() -> tuple[PreTrainedModel, Any]:
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(**_PIXELS, image_grid_pinpoints=_PINPOINTS),
        tokenizer=tokenizer({"<image>": IMAGE, "<video>": VIDEO}),
        video_processor=LlavaOnevisionVideoProcessor(**_PIXELS),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_llava_template(),
    )
    return FAMILIES_A["llava_onevision"].build(), processor


def _llava_next_video() -> tuple[PreTrainedModel, Any]:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    processor = LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(**_PIXELS),
        image_processor=LlavaNextImageProcessorPil(**_PIXELS, image_grid_pinpoints=_PINPOINTS),
        tokenizer=tokenizer({"<image>": IMAGE, "<video>": VIDEO}),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_llava_template(),
    )
    return FAMILIES_A["llava_next_video"].build(), processor


def _llava_template() -> str:
    return TEMPLATE.replace("IMAGE", "<image>").replace("VIDEO", "<video>")


VIDEO_FOLDERS: dict[str, Callable[[], tuple[PreTrainedModel, Any]]] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "llava_onevision": _llava_onevision,
    "llava_next_video": _llava_next_video,
}


def write_video_folder(folder: Path, family: str) -> Path:
    """A tiny checkpoint of a family with its processor."""
    model, processor = VIDEO_FOLDERS[family]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
