"""Losses of the alignment phase and of the questions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from schedule_finder.demo import scenes
from scripts.demo_backbone.curriculum import ALIGNMENT_WEIGHT
from scripts.demo_backbone.model import decode, packed_sequence, vision_tokens
from scripts.demo_backbone.vocabulary import EMPTY, NONE, PREFIX, PREFIX_IDS, TOKEN_IDS, VISION_TOKENS


def alignment_loss(
    model: LlavaForConditionalGeneration, tokens: Tensor, cells: Tensor
) -> tuple[Tensor, Tensor]:
    """Asks vision tokens (B, VISION_TOKENS, WIDTH) for the words of their colour, shape, row and column.

    Returns the loss and, as one vector, the accuracy on occupied cells: colour, shape, row, column, all.
    """
    place = torch.arange(VISION_TOKENS, device=cells.device).expand(cells.shape[:2])
    words = model.model.language_model.embed_tokens.weight
    return naming_loss(words, tokens, cells, place // scenes.GRID, place % scenes.GRID)


def naming_loss(
    words: Tensor, tokens: Tensor, cells: Tensor, row: Tensor, column: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of `alignment_loss`, of tokens (B, N, WIDTH) in known rows and columns (B, N)."""
    size = tokens.float().square().mean(dim=-1, keepdim=True).sqrt()
    normed = tokens.float() / (size + 1e-6)
    occupied = cells[..., 0] != NONE
    weight = torch.where(occupied, 1 / occupied.sum(), 1 / (~occupied).sum())
    loss = 0.1 * (size - 1).square().mean()
    correct = []
    for names, target in (
        ((*scenes.COLOUR_NAMES, EMPTY), cells[..., 0] % (len(scenes.COLOUR_NAMES) + 1)),
        ((*scenes.SHAPE_NAMES, EMPTY), cells[..., 1] % (len(scenes.SHAPE_NAMES) + 1)),
        (scenes.ROW_NAMES, row),
        (scenes.COLUMN_NAMES, column),
    ):
        logits = word_logits(words, normed, names)
        losses = functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="none", label_smoothing=0.05
        )
        loss = loss + (losses.view_as(weight) * weight).sum() / 8
        correct.append(logits.argmax(dim=-1) == target)
    every = torch.stack([*correct, torch.stack(correct).all(dim=0)])
    return loss, (every & occupied).sum(dim=(1, 2)) / occupied.sum()


def word_logits(
    words: Tensor, normed: Tensor, names: tuple[str, ...], ids: dict[str, int] = TOKEN_IDS
) -> Tensor:
    """Products of states (..., WIDTH) with the embeddings of some words."""
    return normed @ words[torch.tensor([ids[name] for name in names], device=words.device)].float().T


def question_loss(
    model: LlavaForConditionalGeneration, tokens: Tensor, batch: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    """Loss of the packed questions, correctness per text token, and the size of the last residual.

    `tokens` (B, VISION_TOKENS, WIDTH). The size is the mean Euclidean norm over the answering tokens.
    """
    embed = model.model.language_model.embed_tokens
    start = embed(torch.tensor(PREFIX_IDS[:2], device=tokens.device)).expand(len(tokens), -1, -1)
    x = torch.cat([start, tokens.to(start.dtype), embed(batch["ids"])], dim=1)
    x = decode(model, x, *packed_sequence(batch["block"], batch["positions"]))[:, PREFIX:]
    return answering_loss(model, x, batch)


def answering_loss(model: PreTrainedModel, x: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """As `question_loss`, from the last states of the text tokens (B, TEXT, WIDTH)."""
    logits = model.lm_head(model.model.language_model.norm(x)).float()
    losses = functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    answering = batch["types"] != NONE
    loss = (losses.view_as(answering) * batch["weights"]).sum() / answering.sum()
    norm = (x.float().norm(dim=-1) * answering).sum() / answering.sum()
    return loss, logits.argmax(dim=-1) == batch["targets"], norm


def vision_alignment_loss(
    model: LlavaForConditionalGeneration, batch: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    """`alignment_loss` of a batch, without the decoder."""
    return alignment_loss(model, vision_tokens(model, batch["pictures"]), batch["cells"])


def training_loss(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What a step minimises, then what it reports: question loss, correctness, residual size, readability."""
    tokens = vision_tokens(model, batch["pictures"])
    aligned, readable = alignment_loss(model, tokens, batch["cells"])
    loss, correct, norm = question_loss(model, tokens, batch)
    return loss + ALIGNMENT_WEIGHT * aligned, loss, correct, norm, readable
