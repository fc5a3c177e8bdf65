"""Tiny checkpoint folders that vLLM serves on a CPU: its attention kernel needs heads of 32 at least."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from schedule_finder.demo import BACKBONE_FOLDER

QWEN_SPECIAL = (
    *("<pad>", "<|im_start|>", "<|im_end|>", "<unk>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
NEXT_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
WORDS = ("user", "assistant", "what", "is", "this", "?", *(f"word{number}" for number in range(114)))
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %} {{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


def write_demo_folder(folder: Path) -> Path:
    """The demo backbone with the names of its tower's tensors that stock vLLM 0.32 knows."""
    shutil.copytree(BACKBONE_FOLDER, folder, dirs_exist_ok=True)
    weights = load_file(BACKBONE_FOLDER / "model.safetensors")
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model."): one for name, one in weights.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_qwen_folder(folder: Path) -> Path:
    """Qwen2.5-VL with random weights."""
    pixels = {"patch_size": 14, "merge_size": 2, "min_pixels": 28 * 28, "max_pixels": 28 * 28 * 256}
    vision_block = "<|vision_start|><|image_pad|><|vision_end|>"
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=_tokenizer(QWEN_SPECIAL, eos_token="<|im_end|>"),
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=TEMPLATE.replace("IMAGE", vision_block),
    ).save_pretrained(folder)
    ids = {name: QWEN_SPECIAL.index(name) for name in QWEN_SPECIAL}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "spatial_merge_size": 2,
            "tokens_per_second": 2,
        },
        text_config={
            **_decoder(len(QWEN_SPECIAL)),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    _randomized(Qwen2_5_VLForConditionalGeneration, config).save_pretrained(folder)
    return folder


def write_qwen3_folder(folder: Path) -> Path:
    """Qwen3-VL with random weights and DeepStack features after three tower layers."""
    pixels = {"patch_size": 16, "merge_size": 2, "min_pixels": 32 * 32, "max_pixels": 32 * 32 * 256}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=_tokenizer(QWEN_SPECIAL, eos_token="<|im_end|>"),
        video_processor=Qwen3VLVideoProcessor(patch_size=16, merge_size=2),
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    ).save_pretrained(folder)
    ids = {name: QWEN_SPECIAL.index(name) for name in QWEN_SPECIAL}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        text_config={**_decoder(len(QWEN_SPECIAL)), "head_dim": 32, "rope_parameters": rope},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    _randomized(Qwen3VLForConditionalGeneration, config).save_pretrained(folder)
    return folder


def write_llava_next_folder(folder: Path) -> Path:
    """LLaVA-NeXT with random weights: a thumbnail and up to two tiles of 16 tokens, and image-newline tokens."""
    pinpoints = [[64, 128], [128, 64], [64, 64]]
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=_tokenizer(NEXT_SPECIAL, eos_token="<eos>"),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    ).save_pretrained(folder)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=16,
            projection_dim=64,
        ),
        text_config=LlamaConfig(**_decoder(len(NEXT_SPECIAL))),
        image_token_index=NEXT_SPECIAL.index("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    _randomized(LlavaNextForConditionalGeneration, config).save_pretrained(folder)
    return folder


def _decoder(special: int) -> dict[str, object]:
    return {
        "vocab_size": special + len(WORDS),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _tokenizer(special: tuple[str, ...], *, eos_token: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate((*special, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=eos_token,
        unk_token="<unk>",
        additional_special_tokens=[name for name in special if name.startswith(("<|", "<image"))],
    )


def _randomized(model_class: type[PreTrainedModel], config: object) -> PreTrainedModel:
    """Weights so large that answers depend on which tokens are kept."""
    torch.manual_seed(0)
    model = model_class(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "image_newline" in name:
                parameter.normal_(0, 0.5)
            elif parameter.ndim > 1:
                spread = 0.5 if "embed" in name else 0.8 / parameter.flatten(1).shape[1] ** 0.5
                parameter.normal_(0, spread)
    return model
