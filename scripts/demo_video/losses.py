"""Losses of the video demo backbone: as the demo backbone's, and one for the time of each vision token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    LlavaNextVideoForConditionalGeneration,
)

from schedule_finder.demo import clips
from scripts.demo_backbone.losses import answering_loss, naming_loss, word_logits
from scripts.demo_backbone.model import decode, packed_sequence
from scripts.demo_video.model import clip_tokens
from scripts.demo_video.vocabulary import PREFIX, PREFIX_IDS, TOKEN_IDS, VISION_TOKENS

TIMING_LAYERS = 2
"""After so many decoder layers, a vision token is asked for its frame: only its position in the sequence says so."""
TIMING_WEIGHT = 1.0


def clip_alignment_loss(
    model: LlavaNextVideoForConditionalGeneration, batch: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    """Asks vision tokens for the words of their colour, shape, row and column; no decoder."""
    return _named(model, clip_tokens(model, batch["pictures"]), batch["cells"])


def _named(
    model: LlavaNextVideoForConditionalGeneration, tokens: Tensor, cells: Tensor
) -> tuple[Tensor, Tensor]:
    place = torch.arange(VISION_TOKENS, device=cells.device).expand(cells.shape[:2]) % clips.FRAME_TOKENS
    # The words are those of a decoder that is trained already: only what names them changes.
    words = model.model.language_model.embed_tokens.weight.detach()
    return naming_loss(words, tokens, cells, place // clips.GRID, place % clips.GRID)


def clip_training_loss(
    model: LlavaNextVideoForConditionalGeneration, batch: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    """What a step minimises, then what it reports: question loss, correctness, residual size, readability."""
    with torch.no_grad():
        tokens = clip_tokens(model, batch["pictures"])
        _, readable = _named(model, tokens, batch["cells"])
    embed = model.model.language_model.embed_tokens
    start = embed(torch.tensor(PREFIX_IDS[:2], device=tokens.device)).expand(len(tokens), -1, -1)
    x = torch.cat([start, tokens.to(start.dtype), embed(batch["ids"])], dim=1)
    positions, bias = packed_sequence(batch["block"], batch["positions"], PREFIX)
    x = decode(model, x, positions, bias, slice(None, TIMING_LAYERS))
    timed, known = _timing_loss(embed.weight, x[:, 2:PREFIX])
    x = decode(model, x, positions, bias, slice(TIMING_LAYERS, None))[:, PREFIX:]
    loss, correct, norm = answering_loss(model, x, batch)
    return loss + TIMING_WEIGHT * timed, loss, correct, norm, torch.cat([readable, known[None]])


def _timing_loss(words: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """Asks the states of vision tokens (B, VISION_TOKENS, WIDTH) for the word of their frame; loss and accuracy."""
    states = states.float()
    normed = states / (states.square().mean(dim=-1, keepdim=True).sqrt() + 1e-6)
    frame = torch.arange(VISION_TOKENS, device=states.device).expand(states.shape[:2]) // clips.FRAME_TOKENS
    logits = word_logits(words, normed, clips.FRAME_NAMES, TOKEN_IDS)
    loss = functional.cross_entropy(logits.flatten(0, 1), frame.flatten(), label_smoothing=0.05)
    return loss, (logits.argmax(dim=-1) == frame).float().mean()
