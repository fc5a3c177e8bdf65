"""The stock video model, warm-started from the demo backbone, and a leaner forward over the same weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
)

from schedule_finder.demo import BACKBONE_FOLDER, clips, scenes
from scripts.demo_backbone.model import WIDTH, cut, decoder_config, tower_config, tower_states
from scripts.demo_backbone.vocabulary import IMAGE, SPECIAL_TOKENS
from scripts.demo_video.vocabulary import TOKEN_IDS, VIDEO, VISION_TOKENS, VOCABULARY

LAYERS = 8
"""The demo backbone's decoder answers as well without its layers 7 to 10, which see nothing new."""
_POSITIONS = "model.vision_tower.embeddings.position_embedding.weight"
_LAYERS = "model.language_model.layers."
_WORDS = "model.language_model.embed_tokens.weight"


def build_model(layers: int = LAYERS) -> LlavaNextVideoForConditionalGeneration:
    """The untrained model."""
    config = LlavaNextVideoConfig(
        vision_config=tower_config(clips.FRAME_SIZE, clips.PATCH),
        text_config=decoder_config(layers, len(VOCABULARY)),
        image_token_index=TOKEN_IDS[IMAGE],
        video_token_index=TOKEN_IDS[VIDEO],
        video_seq_length=VISION_TOKENS,
        image_grid_pinpoints=[[clips.FRAME_SIZE, clips.FRAME_SIZE]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **SPECIAL_TOKENS,
    )
    return LlavaNextVideoForConditionalGeneration(config)


@torch.no_grad()
def warm_start(model: LlavaNextVideoForConditionalGeneration, folder: Path = BACKBONE_FOLDER) -> None:
    """Takes over the demo backbone's weights: of its decoder the first layers and the last.

    New words and the image newline get random embeddings.
    """
    layers = model.config.text_config.num_hidden_layers
    stored = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    demo = dict(stored.state_dict())
    own = model.state_dict()
    # The class token's position, then those of the upper left part of the demo's larger picture.
    side = 2 * clips.GRID
    patches = demo[_POSITIONS][1:].unflatten(0, (scenes.GRID, scenes.GRID))[:side, :side].flatten(0, 1)
    demo[_POSITIONS] = torch.cat([demo[_POSITIONS][:1], patches])
    last = max(int(name.removeprefix(_LAYERS).split(".")[0]) for name in demo if name.startswith(_LAYERS))
    kept = {**{layer: layer for layer in range(layers - 1)}, last: layers - 1}
    demo = {_renamed(name, kept): weight for name, weight in demo.items() if _renamed(name, kept)}
    words = demo[_WORDS]
    fresh = torch.randn(len(VOCABULARY) - len(words), WIDTH) * words.std()
    demo[_WORDS] = torch.cat([words, fresh])
    own["model.image_newline"].copy_(torch.randn(WIDTH) * words.std())
    for name, weight in demo.items():
        if name != "lm_head.weight":  # tied
            own[name].copy_(weight)


def _renamed(name: str, layers: dict[int, int]) -> str:
    """The name with the layer's new number; empty where the layer is not taken over."""
    if not name.startswith(_LAYERS):
        return name
    number, _, rest = name.removeprefix(_LAYERS).partition(".")
    return f"{_LAYERS}{layers[int(number)]}.{rest}" if int(number) in layers else ""


def clip_tokens(model: LlavaNextVideoForConditionalGeneration, frames: Tensor) -> Tensor:
    """Frames (B, F, H, W, 3) as uint8 -> what stands in the sequence for them: (B, VISION_TOKENS, WIDTH)."""
    side = 2 * clips.GRID
    states = tower_states(model.model.vision_tower, cut(frames.flatten(0, 1), side, clips.PATCH))[:, 1:]
    pooled = functional.avg_pool2d(states.transpose(1, 2).unflatten(2, (side, side)), 2)
    tokens = model.model.multi_modal_projector(pooled.flatten(2).transpose(1, 2))
    return tokens.view(len(frames), VISION_TOKENS, WIDTH)
