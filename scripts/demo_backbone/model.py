"""The stock model, and a leaner forward over the same weights for packed questions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from schedule_finder.demo import scenes
from scripts.demo_backbone.vocabulary import (
    IMAGE,
    NONE,
    PIXEL_MEAN,
    PIXEL_STD,
    PREFIX,
    SPECIAL_TOKENS,
    TEXT,
    TOKEN_IDS,
    VISION_TOKENS,
    VOCABULARY,
)

LAYERS, WIDTH, HEADS, INNER = 12, 128, 4, 256
HEAD_SIZE = WIDTH // HEADS
_SHAPE = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS}


def tower_config(image_size: int, patch_size: int) -> CLIPVisionConfig:
    """The vision tower: one layer over patches of `patch_size` pixels."""
    return CLIPVisionConfig(
        **_SHAPE, num_hidden_layers=1, image_size=image_size, patch_size=patch_size, projection_dim=WIDTH
    )


def decoder_config(layers: int, words: int) -> LlamaConfig:
    """The decoder over a vocabulary of so many words."""
    return LlamaConfig(
        **_SHAPE,
        **SPECIAL_TOKENS,
        num_hidden_layers=layers,
        vocab_size=words,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )


def build_model(layers: int = LAYERS) -> LlavaForConditionalGeneration:
    """The untrained model, with a decoder of `layers` layers."""
    config = LlavaConfig(
        vision_config=tower_config(scenes.IMAGE_SIZE, scenes.CELL),
        text_config=decoder_config(layers, len(VOCABULARY)),
        image_token_id=TOKEN_IDS[IMAGE],
        image_seq_length=VISION_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **SPECIAL_TOKENS,
    )
    model = LlavaForConditionalGeneration(config)
    initialise(model)
    return model


@torch.no_grad()
def initialise(model: LlavaForConditionalGeneration) -> None:
    """Variance-preserving weights; outputs into the residual stream shrink with the depth."""
    layers = model.config.text_config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            std = 1 / math.sqrt(fan_in)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * layers)
            parameter.normal_(std=std)
        elif name.endswith("bias"):
            parameter.zero_()
    # As strong as the patch contents: where an object lies has to survive beside what it is.
    model.model.vision_tower.embeddings.position_embedding.weight.normal_(std=1.0)
    model.model.language_model.norm.weight.fill_(0.5)


def vision_tokens(model: LlavaForConditionalGeneration, pictures: Tensor) -> Tensor:
    """Pictures (B, H, W, 3) as uint8 -> what stands in the sequence for them: (B, VISION_TOKENS, WIDTH)."""
    patches = cut(pictures, scenes.GRID, scenes.CELL)
    return model.model.multi_modal_projector(tower_states(model.model.vision_tower, patches)[:, 1:])


def cut(pictures: Tensor, grid: int, cell: int) -> Tensor:
    """Pictures (B, H, W, 3) as uint8 -> normalised pixels of their patches: (B, grid * grid, 3 * cell * cell)."""
    batch = len(pictures)
    pixels = (pictures.float() / 255 - PIXEL_MEAN) / PIXEL_STD
    patches = pixels.view(batch, grid, cell, grid, cell, 3).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(batch, grid * grid, 3 * cell * cell)


def tower_states(tower: nn.Module, patches: Tensor) -> Tensor:
    """Last states of a CLIP tower, the class token first."""
    x = functional.linear(patches, tower.embeddings.patch_embedding.weight.flatten(1))
    class_token = tower.embeddings.class_embedding.expand(len(patches), 1, -1)
    x = torch.cat([class_token, x], dim=1) + tower.embeddings.position_embedding.weight
    x = tower.pre_layrnorm(x)
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        normed = layer.layer_norm1(x)
        q, k, v = (
            split_heads(project(normed)) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        x = x + attention.out_proj(attend(q, k, v, None))
        x = x + layer.mlp(layer.layer_norm2(x))
    return x


def decode(
    model: LlavaForConditionalGeneration,
    x: Tensor,
    positions: Tensor,
    bias: Tensor,
    layers: slice = slice(None),
) -> Tensor:
    """The decoder layers, or some of them, without the final norm.

    `x` (B, L, WIDTH), `positions` (B, L), `bias` (B, 1, L, L): added to the attention scores.
    """
    decoder = model.model.language_model
    cos, sin = (table.unsqueeze(1) for table in decoder.rotary_emb(x, positions))
    for layer in decoder.layers[layers]:
        attention = layer.self_attn
        normed = layer.input_layernorm(x)
        q, k, v = (
            split_heads(project(normed)) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        x = x + attention.o_proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v, bias))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return x


def split_heads(x: Tensor) -> Tensor:
    """(B, L, WIDTH) -> (B, HEADS, L, HEAD_SIZE)"""
    return x.unflatten(-1, (HEADS, HEAD_SIZE)).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: `x` (B, HEADS, L, HEAD_SIZE), `cos` and `sin` (B, 1, L, HEAD_SIZE)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention written out: the backward pass of the fused kernel is several times slower on a CPU."""
    scores = (q @ k.transpose(-1, -2)).float() * HEAD_SIZE**-0.5
    if bias is not None:
        scores = scores + bias
    mixed = scores.softmax(dim=-1).to(v.dtype) @ v
    return mixed.transpose(1, 2).flatten(2)


def packed_sequence(block: Tensor, text_positions: Tensor, prefix: int = PREFIX) -> tuple[Tensor, Tensor]:
    """Positions (B, L) and attention bias (B, 1, L, L) of prefix plus packed questions, L = prefix + TEXT.

    `block` (B, TEXT): number of the question a token belongs to, `text_positions` (B, TEXT).
    """
    batch, device = len(block), block.device
    prefix_positions = torch.arange(prefix, device=device).expand(batch, -1)
    # The prefix counts as a block that everybody sees.
    blocks = torch.cat([torch.full((batch, prefix), NONE - 1, device=device), block], dim=1)
    same = (blocks[:, :, None] == blocks[:, None, :]) | (blocks[:, None, :] == NONE - 1)
    order = torch.arange(prefix + TEXT, device=device)
    visible = same & (order[:, None] >= order[None, :])
    bias = torch.zeros(visible.shape, device=device).masked_fill(~visible, -1e9)
    return torch.cat([prefix_positions, text_positions], dim=1), bias[:, None]
