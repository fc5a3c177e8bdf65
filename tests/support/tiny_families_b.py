"""The Gemma line, PaliGemma, Molmo2, Llama 4, Phi-4-multimodal and Kimi-K2.5 with random weights.

Each family is built in-process from a small configuration and makes batches in the form that its
processor gives: these families differ in their masks (bidirectional over an image, over the prompt, in
chunks), so what tells the model where an image stands belongs to the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    GemmaConfig,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from tests.support.own_mask_reference import append_tokens
from tests.support.tiny_models import (
    BOS,
    IMAGE,
    IMAGE_TOKENS,
    LAYERS,
    PAD,
    VIDEO,
    VISION_END,
    VISION_START,
    Inputs,
    _build,
    _text,
)

AUDIO, IMAGE_START_LOW, IMAGE_COLUMN = 116, 117, 118
IMAGE_PLACES = tuple(range(IMAGE, IMAGE + IMAGE_TOKENS))
"""Ids of a text model's stand-in for an image: without a tower, each place needs an embedding of its own."""

CHUNK_SIZE = 9
ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)


def _no_more(_inputs: Inputs) -> Inputs:
    return {}


@dataclass(frozen=True)
class FamilyB:
    """One family: how to build it, how its batches look, and how they grow by generated tokens."""

    build: Callable[..., PreTrainedModel]
    image_inputs: Callable[[int, torch.Generator], Inputs]
    image_block: tuple[int, ...]
    """Token ids that stand for one image."""
    more_inputs: Callable[[Inputs], Inputs] = _no_more
    """What else the processor returns, given ids and mask."""
    extend: Callable[[Inputs, Tensor], Inputs] = append_tokens
    """The prompt with generated tokens, as `generate` would count them."""
    vision_ids: tuple[int, ...] = (IMAGE,)
    images_first: bool = False
    """The processor puts all images before the first token."""
    needs_mask: bool = False
    """Vision tokens cannot be told from their ids; `pruned` is given a mask."""
    rows: tuple[int, ...] = (2, 1, 0)
    """Images per row of a ragged batch."""
    kernels: tuple[str, ...] = ("sdpa", "eager")
    """Attention kernels that compute the family rightly."""
    class_name: str | None = None
    """The transformers class, where not every supported release has it."""

    @property
    def missing(self) -> str | None:
        """Why this family cannot be built with the installed release; None where it can."""
        if self.class_name is None or hasattr(transformers, self.class_name):
            return None
        return f"transformers {transformers.__version__} has no {self.class_name}"

    def batch(
        self, images_per_row: Sequence[int] | None = None, *, text: Sequence[int] | None = None, seed: int = 0
    ) -> Inputs:
        """Left-padded prompts; row ``i`` holds ``images_per_row[i]`` images and ``text[i]`` text tokens."""
        images_per_row = self.rows if images_per_row is None else images_per_row
        generator = torch.Generator().manual_seed(seed)
        text = text or [7 + 2 * row for row in range(len(images_per_row))]
        rows = []
        for images, words in zip(images_per_row, text, strict=True):
            if self.images_first:
                ids = [*self.image_block * images, BOS]
            else:
                ids = [BOS, *_words(2, generator)]
                for _ in range(images):
                    ids += [*self.image_block, *_words(1, generator)]
            rows.append(ids + _words(words, generator))
        length = max(map(len, rows))
        input_ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
        inputs = {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}
        if sum(images_per_row):
            inputs |= self.image_inputs(sum(images_per_row), generator)
        return inputs | self.more_inputs(inputs)

    def level_batch(self) -> Inputs:
        """Two rows of one length with different numbers of images: none is padded, both are pruned."""
        between = 0 if self.images_first else 1
        return self.batch((2, 1), text=[6, 6 + len(self.image_block) + between])

    def vision(self, inputs: Inputs) -> Tensor:
        """True at vision tokens, found without the runtime."""
        return torch.isin(inputs["input_ids"], torch.tensor(self.vision_ids))


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, 100, (count,), generator=generator).tolist()


def _siglip(**changes: Any) -> SiglipVisionConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return SiglipVisionConfig(image_size=16, patch_size=4, vision_use_head=False, **sizes | changes)


def _siglip_images(count: int, generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator)}


def _mark_images(name: str, *others: int) -> Callable[[Inputs], Inputs]:
    """1 at vision tokens and ``others``, as processors mark them for masks that are bidirectional there."""
    marked = torch.tensor((IMAGE, *others))
    return lambda inputs: {name: torch.isin(inputs["input_ids"], marked).long()}


def _append_marked(inputs: Inputs, tokens: Tensor) -> Inputs:
    """As `append_tokens`, for families that mark vision tokens and yet count positions along the mask."""
    sequence = append_tokens(inputs, tokens)
    sequence["position_ids"] = (sequence["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return sequence


_marked_block = (VISION_START, *[IMAGE] * IMAGE_TOKENS, VISION_END)


# ---- Gemma


def build_gemma3(*, seed: int = 0, attention: str = "sdpa", **text: Any) -> PreTrainedModel:
    """Gemma 3: sliding and full layers with a RoPE of their own each, bidirectional over an image."""
    defaults = {
        "head_dim": 8,
        "query_pre_attn_scalar": 4,
        "layer_types": list(ALTERNATING),
        "sliding_window": CHUNK_SIZE,
    }
    config = Gemma3Config(
        vision_config=_siglip(),
        text_config=Gemma3TextConfig(**_text(**defaults | text)),
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )
    return _build(Gemma3ForConditionalGeneration, config, seed=seed, attention=attention)


def build_gemma3n(*, seed: int = 0, attention: str = "sdpa", **text: Any) -> PreTrainedModel:
    """Gemma 3n's text model: AltUp's 4-D hidden states, per-layer inputs, the last layers share keys.

    The whole class is out of reach, as its tower is a timm model; the text class alone runs the same
    decoder. Its configuration is given the vision id that the whole one would have.
    """
    defaults = {
        "head_dim": 8,
        "layer_types": list(ALTERNATING),
        "sliding_window": CHUNK_SIZE,
        "vocab_size_per_layer_input": 120,
        "hidden_size_per_layer_input": 12,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "image_token_id": IMAGE,
    }
    config = Gemma3nTextConfig(**_text(**defaults | text))
    return _build(Gemma3nForCausalLM, config, seed=seed, attention=attention)


def _no_images(_count: int, _generator: torch.Generator) -> Inputs:
    return {}


def build_gemma4(*, seed: int = 0, attention: str = "sdpa", **text: Any) -> PreTrainedModel:
    """Gemma 4 as its small members: per-layer inputs, shared keys, full layers with wider heads."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "pooling_kernel_size": 2,
        "patch_size": 4,
        "position_embedding_size": 16,
    }
    defaults = {
        "head_dim": 8,
        "global_head_dim": 16,
        "layer_types": list(ALTERNATING),
        "sliding_window": CHUNK_SIZE,
        "vocab_size_per_layer_input": 120,
        "hidden_size_per_layer_input": 12,
        "num_kv_shared_layers": 2,
    }
    config = Gemma4Config(
        vision_config=vision,
        text_config=_text(**defaults | text),
        boi_token_id=VISION_START,
        eoi_token_id=VISION_END,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )
    return _build(Gemma4ForConditionalGeneration, config, seed=seed, attention=attention)


def build_gemma4_own_keys(*, seed: int = 0, attention: str = "sdpa", **text: Any) -> PreTrainedModel:
    """Gemma 4 with per-layer inputs, but keys of its own in every layer."""
    return build_gemma4(seed=seed, attention=attention, **{"num_kv_shared_layers": 0} | text)


def build_gemma4_large(*, seed: int = 0, attention: str = "sdpa", **text: Any) -> PreTrainedModel:
    """Gemma 4 as its large members: no per-layer inputs, sliding layers bidirectional over an image, full
    layers with fewer key heads, whose keys are their values; experts beside the MLP."""
    defaults = {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "use_bidirectional_attention": "vision",
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    }
    return build_gemma4(seed=seed, attention=attention, **defaults | text)


def _gemma4_images(count: int, generator: torch.Generator) -> Inputs:
    # An 8 x 8 grid of patches, pooled 2 x 2 into 16 vision tokens.
    grid = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy"), -1).view(1, 64, 2)
    return {
        "pixel_values": torch.rand(count, 64, 3 * 4 * 4, generator=generator),
        "image_position_ids": grid.expand(count, -1, -1).contiguous(),
    }


# ---- PaliGemma


def _paligemma(text: PreTrainedConfig, seed: int, attention: str) -> PreTrainedModel:
    config = PaliGemmaConfig(
        vision_config=_siglip(),
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=48,
        hidden_size=48,
        vocab_size=120,
    )
    return _build(PaliGemmaForConditionalGeneration, config, seed=seed, attention=attention)


def build_paligemma(*, seed: int = 0, attention: str = "sdpa", **text: Any) -> PreTrainedModel:
    """PaliGemma: the whole prompt is attended to in both directions, positions are counted from 1."""
    return _paligemma(GemmaConfig(**_text(**{"head_dim": 8} | text)), seed, attention)


def build_paligemma2(*, seed: int = 0, attention: str = "eager", **text: Any) -> PreTrainedModel:
    """PaliGemma 2: Gemma 2's sliding layers and soft-capped logits, which only its eager attention knows."""
    defaults = {
        "head_dim": 8,
        "query_pre_attn_scalar": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 30.0,
        "layer_types": list(ALTERNATING),
        "sliding_window": CHUNK_SIZE,
    }
    return _paligemma(Gemma2Config(**_text(**defaults | text)), seed, attention)


def _mark_prefix(inputs: Inputs) -> Inputs:
    """0 all over the prompt: the tokenizer's first segment."""
    return {"token_type_ids": torch.zeros_like(inputs["input_ids"])}


def _append_suffix(inputs: Inputs, tokens: Tensor) -> Inputs:
    """Generated tokens are the causal suffix (1), and positions are counted from 1."""
    sequence = append_tokens(inputs, tokens)
    sequence["token_type_ids"][:, inputs["input_ids"].shape[1] :] = 1
    sequence["position_ids"] = sequence["position_ids"] + 1
    return sequence


# ---- Molmo2

_MOLMO2_FRAME = (VISION_START, IMAGE_START_LOW, IMAGE_COLUMN, VISION_END)
"""Tokens around the vision tokens, which belong to the block that sees itself."""


def build_molmo2(*, seed: int = 0, attention: str = "sdpa", **text: Any) -> PreTrainedModel:
    """Molmo2: a RoPE per group of layers, all tokens of a row's images see one another."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    vision = sizes | {
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "image_size": [16, 16],
        "patch_size": 4,
    }
    adapter = sizes | {"vision_feature_layer": [1, 0], "intermediate_size": 48, "text_hidden_size": 48}
    defaults = {
        "head_dim": 8,
        "additional_vocab_size": 8,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        "rope_scaling_layers": [0, 3, 4],
    }
    config = transformers.Molmo2Config(
        vision_config=vision,
        adapter_config=adapter,
        text_config=_text(**defaults | text),
        image_patch_id=IMAGE,
        image_start_token_id=VISION_START,
        low_res_image_start_token_id=IMAGE_START_LOW,
        image_end_token_id=VISION_END,
        frame_start_token_id=VISION_START,
        frame_end_token_id=VISION_END,
    )
    return _build(transformers.Molmo2ForConditionalGeneration, config, seed=seed, attention=attention)


def _molmo2_images(count: int, generator: torch.Generator) -> Inputs:
    # One crop of the whole image and two beside each other; 4 x 4 patches each, pooled 2 x 2.
    low = torch.arange(16).view(4, 4)
    high = torch.cat([low + 16, low + 32], 1)
    pooled = [
        grid.view(2, 2, -1, 2).transpose(1, 2).reshape(-1, 4)  # rows and columns of 2 x 2 windows
        for grid in (low, high)
    ]
    one = torch.cat(pooled)
    return {
        "pixel_values": torch.randn(count * 3, 16, 3 * 4 * 4, generator=generator),
        "image_token_pooling": torch.cat([one + 48 * image for image in range(count)]),
        "image_grids": torch.tensor([[2, 2, 2, 4]] * count),
        "image_num_crops": torch.tensor([3] * count),
    }


_molmo2_block = (
    *(IMAGE_START_LOW, *(IMAGE, IMAGE, IMAGE_COLUMN) * 2, VISION_END),
    *(VISION_START, *(*[IMAGE] * 4, IMAGE_COLUMN) * 2, VISION_END),
)


# ---- Llama 4


def build_llama4(*, seed: int = 0, attention: str = "sdpa", **text: Any) -> PreTrainedModel:
    """Llama 4: attention in chunks with a complex RoPE, full layers without RoPE, experts."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 4,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    }
    defaults = {
        "head_dim": 8,
        "intermediate_size_mlp": 64,
        "attention_chunk_size": 13,
        "no_rope_layer_interval": 3,
        "interleave_moe_layer_step": 2,
        "num_local_experts": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = Llama4Config(
        vision_config=vision,
        text_config=_text(**defaults | text),
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )
    return _build(Llama4ForConditionalGeneration, config, seed=seed, attention=attention)


def _llama4_images(count: int, generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(count, 3, 32, 32, generator=generator)}


# ---- Phi-4-multimodal

_PHI4_TOKENS = 3 * 4 + 1 + 3 * 4
"""A crop's 3 x 3 tokens with a newline token per row, a image newline, and the same of the whole image."""


def build_phi4_multimodal(*, seed: int = 0, attention: str = "sdpa", **text: Any) -> PreTrainedModel:
    """Phi-4-multimodal: a causal LM whose text configuration is the whole one; its vision id is nested."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 24,
        "crop_size": 24,
        "patch_size": 4,
        "image_token_id": IMAGE,
    }
    audio = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 16,
        "depthwise_separable_out_channel": 16,
        "nemo_conv_channels": 8,
        "audio_token_id": AUDIO,
    }
    config = Phi4MultimodalConfig(vision_config=vision, audio_config=audio, **_text(**text))
    return _build(Phi4MultimodalForCausalLM, config, seed=seed, attention=attention)


def build_phi4_sliding(*, seed: int = 0, attention: str = "sdpa", **text: Any) -> PreTrainedModel:
    """Phi-4-multimodal with a window in every layer, which no list of layer kinds announces."""
    return build_phi4_multimodal(seed=seed, attention=attention, **{"sliding_window": 3 * CHUNK_SIZE} | text)


def _phi4_images(count: int, generator: torch.Generator) -> Inputs:
    return {
        "image_pixel_values": torch.randn(count, 2, 3, 24, 24, generator=generator),
        "image_sizes": torch.tensor([[24, 24]] * count),
        "image_attention_mask": torch.ones(count, 2, 6, 6, dtype=torch.long),
    }


# ---- Kimi-K2.5


def build_kimi_k25(*, seed: int = 0, attention: str = "sdpa", **text: Any) -> PreTrainedModel:
    """Kimi-K2.5: DeepSeek-V3's latent attention, whose keys and values differ in width, and experts."""
    vision = {
        "patch_size": 4,
        "pos_emb_height": 8,
        "pos_emb_width": 8,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
    }
    defaults = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
    }
    config = Kimi_K25Config(
        vision_config=vision,
        text_config=DeepseekV3Config(**_text(**defaults | text)),
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return _build(Kimi_K25ForConditionalGeneration, config, seed=seed, attention=attention)


def _kimi_images(count: int, generator: torch.Generator) -> Inputs:
    return {
        "pixel_values": torch.randn(count * 64, 3, 4, 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * count),
    }


FAMILIES_B: dict[str, FamilyB] = {
    "gemma3": FamilyB(build_gemma3, _siglip_images, _marked_block, _mark_images("token_type_ids")),
    "gemma3n": FamilyB(build_gemma3n, _no_images, IMAGE_PLACES, vision_ids=IMAGE_PLACES, needs_mask=True),
    "gemma4": FamilyB(
        build_gemma4, _gemma4_images, _marked_block, _mark_images("mm_token_type_ids"), _append_marked
    ),
    "gemma4_own_keys": FamilyB(
        build_gemma4_own_keys,
        _gemma4_images,
        _marked_block,
        _mark_images("mm_token_type_ids"),
        _append_marked,
    ),
    "gemma4_large": FamilyB(
        build_gemma4_large, _gemma4_images, _marked_block, _mark_images("mm_token_type_ids"), _append_marked
    ),
    # PaliGemma's processor wants an image in every row.
    "paligemma": FamilyB(
        build_paligemma,
        _siglip_images,
        (IMAGE,) * IMAGE_TOKENS,
        _mark_prefix,
        _append_suffix,
        images_first=True,
        rows=(2, 1),
    ),
    "paligemma2": FamilyB(
        build_paligemma2,
        _siglip_images,
        (IMAGE,) * IMAGE_TOKENS,
        _mark_prefix,
        _append_suffix,
        images_first=True,
        rows=(2, 1),
        kernels=("eager",),
    ),
    "molmo2": FamilyB(
        build_molmo2,
        _molmo2_images,
        _molmo2_block,
        _mark_images("mm_token_type_ids", *_MOLMO2_FRAME),
        _append_marked,
        class_name="Molmo2ForConditionalGeneration",
    ),
    "llama4": FamilyB(build_llama4, _llama4_images, _marked_block),
    "phi4_multimodal": FamilyB(build_phi4_multimodal, _phi4_images, (IMAGE,) * _PHI4_TOKENS),
    "phi4_sliding": FamilyB(build_phi4_sliding, _phi4_images, (IMAGE,) * _PHI4_TOKENS),
    "kimi_k25": FamilyB(build_kimi_k25, _kimi_images, _marked_block),
}
