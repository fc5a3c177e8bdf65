"""Trains the embedded demo backbone from scratch and writes its Hugging Face folder.

    python scripts/train_demo_backbone.py                         # about half an hour on two free CPU cores
    python scripts/train_demo_backbone.py --device cuda --workers 8
    python scripts/train_demo_backbone.py --resume                # goes on from the last checkpoint

One unattended run: an alignment phase without the decoder, a curriculum whose levels end when their question
types are learnt, a decay phase of at least a third of all steps, then export and an exact-match test of the
exported folder through `generate()`. The exit status is 1, and the package is left as it was, if the result
misses a bar; the message names the question types to take out of `scenes.QUESTION_TYPES`.

The model is a stock `LlavaForConditionalGeneration`. Training runs a leaner forward over the same weights:
all questions of a picture share one sequence, a mask keeps them apart, positions restart at each question, so
every question sees exactly what it would see alone (`tests/demo/test_backbone.py` compares the two).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import sys
import time
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers import __version__ as transformers_version
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import TYPE_CHECKING

from schedule_finder.demo import BACKBONE_FOLDER, scenes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# ---------------------------------------------------------------------------------------------- vocabulary

PAD, BOS, EOS, IMAGE, UNKNOWN = "<pad>", "<bos>", "<eos>", "<image>", "<unk>"
EMPTY = "empty"  # never asked or answered: what the alignment phase calls a cell without an object
PROMPT_WORDS = ("user", "assistant", "?", "what", "which", "is", "are", "has", "the", "a", "an", "there")
SCENE_WORDS = ("how", "many", "objects", "object", "shaped", "colour", "shape", "row", "column", "at")
RELATION_WORDS = ("left", "right", "of", "above", "below")
VOCABULARY = (
    *(PAD, BOS, EOS, IMAGE, UNKNOWN, EMPTY, *PROMPT_WORDS, *SCENE_WORDS, *RELATION_WORDS, "yes", "no"),
    *(*scenes.COLOUR_NAMES, *scenes.SHAPE_NAMES, *scenes.ROW_NAMES, *scenes.COLUMN_NAMES),
    *scenes.COUNT_NAMES,
)
TOKEN_IDS = {word: index for index, word in enumerate(VOCABULARY)}
SPECIAL_TOKENS = {
    "pad_token_id": TOKEN_IDS[PAD],
    "bos_token_id": TOKEN_IDS[BOS],
    "eos_token_id": TOKEN_IDS[EOS],
}
CONTENT_WORDS = frozenset(
    (*scenes.COLOUR_NAMES, *scenes.SHAPE_NAMES, *scenes.COLUMN_NAMES, "object", "objects")
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)

TRAINED_TYPES = (*scenes.QUESTION_TYPES, *scenes.PRACTICE_TYPES)
VISION_TOKENS = scenes.GRID**2
PREFIX_IDS = [TOKEN_IDS[BOS], TOKEN_IDS["user"]] + [TOKEN_IDS[IMAGE]] * VISION_TOKENS
PREFIX = len(PREFIX_IDS)
TEXT = 104  # text tokens of a packed sequence: about eleven questions with their answers
NONE = -1  # in the integer arrays of a batch: nothing here

PIXEL_MEAN, PIXEL_STD = 0.5, 0.25  # of pixel values in 0 ... 1


def build_processor() -> LlavaProcessor:
    """A stock processor: a word-level tokenizer and pictures of one size."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_IDS, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE},
            do_center_crop=False,
            crop_size={"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE},
            image_mean=[PIXEL_MEAN] * 3,
            image_std=[PIXEL_STD] * 3,
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=PAD,
            bos_token=BOS,
            eos_token=EOS,
            unk_token=UNKNOWN,
            additional_special_tokens=[IMAGE],
            padding_side="left",
            clean_up_tokenization_spaces=False,
        ),
        patch_size=scenes.CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


# --------------------------------------------------------------------------------------------------- model

LAYERS, WIDTH, HEADS, INNER = 12, 128, 4, 256
HEAD_SIZE = WIDTH // HEADS


def build_model(layers: int = LAYERS) -> LlavaForConditionalGeneration:
    """The untrained model, with a decoder of `layers` layers."""
    shape = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **shape,
            num_hidden_layers=1,
            image_size=scenes.IMAGE_SIZE,
            patch_size=scenes.CELL,
            projection_dim=WIDTH,
        ),
        text_config=LlamaConfig(
            **shape,
            **SPECIAL_TOKENS,
            num_hidden_layers=layers,
            vocab_size=len(VOCABULARY),
            max_position_embeddings=256,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        ),
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
    tower = model.model.vision_tower
    batch, grid, cell = len(pictures), scenes.GRID, scenes.CELL
    pixels = (pictures.float() / 255 - PIXEL_MEAN) / PIXEL_STD
    patches = pixels.view(batch, grid, cell, grid, cell, 3).permute(0, 1, 3, 5, 2, 4)
    patches = patches.reshape(batch, VISION_TOKENS, 3 * cell * cell)
    x = functional.linear(patches, tower.embeddings.patch_embedding.weight.flatten(1))
    class_token = tower.embeddings.class_embedding.expand(batch, 1, -1)
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
    return model.model.multi_modal_projector(x[:, 1:])


def decode(model: LlavaForConditionalGeneration, x: Tensor, positions: Tensor, bias: Tensor) -> Tensor:
    """The decoder layers without the final norm.

    `x` (B, L, WIDTH), `positions` (B, L), `bias` (B, 1, L, L): added to the attention scores.
    """
    decoder = model.model.language_model
    cos, sin = (table.unsqueeze(1) for table in decoder.rotary_emb(x, positions))
    for layer in decoder.layers:
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


def packed_sequence(block: Tensor, text_positions: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (B, L) and attention bias (B, 1, L, L) of prefix plus packed questions, L = PREFIX + TEXT.

    `block` (B, TEXT): number of the question a token belongs to, `text_positions` (B, TEXT).
    """
    batch, device = len(block), block.device
    prefix_positions = torch.arange(PREFIX, device=device).expand(batch, -1)
    # The prefix counts as a block that everybody sees.
    blocks = torch.cat([torch.full((batch, PREFIX), NONE - 1, device=device), block], dim=1)
    same = (blocks[:, :, None] == blocks[:, None, :]) | (blocks[:, None, :] == NONE - 1)
    order = torch.arange(PREFIX + TEXT, device=device)
    visible = same & (order[:, None] >= order[None, :])
    bias = torch.zeros(visible.shape, device=device).masked_fill(~visible, -1e9)
    return torch.cat([prefix_positions, text_positions], dim=1), bias[:, None]


# ---------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class BatchRequest:
    """What a worker needs to make a batch; equal requests give equal batches."""

    seed: int
    step: int
    images: int
    object_count: tuple[int, int]
    type_shares: tuple[tuple[str, float], ...]  # empty: pictures without questions


def make_batch(request: BatchRequest) -> dict[str, np.ndarray]:
    """Pictures with as many questions each as fit into TEXT tokens.

    `targets` and `weights` (B, TEXT) say what each token has to predict and how much that counts; `types`
    holds the question type at the token that predicts the answer; `cells` (B, VISION_TOKENS, 2) the colour
    and shape in each cell.
    """
    images, shape = request.images, (request.images, TEXT)
    batch = {
        "pictures": np.empty((images, scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3), np.uint8),
        "cells": np.full((images, VISION_TOKENS, 2), NONE, np.int64),
        "ids": np.full(shape, TOKEN_IDS[PAD], np.int64),
        "positions": np.zeros(shape, np.int64),
        "block": np.full(shape, NONE, np.int64),
        "targets": np.zeros(shape, np.int64),
        "weights": np.zeros(shape, np.float32),
        "types": np.full(shape, NONE, np.int64),
    }
    for row in range(images):
        rng = scenes.scene_rng("train", request.seed, request.step * images + row)
        scene = scenes.draw_scene(rng, "train", request.object_count)
        batch["pictures"][row] = scenes.render_scene(scene, rng)
        for one in scene.objects:
            batch["cells"][row, one.region] = one.combination
        if request.type_shares:
            _pack_questions(batch, row, scene, request.type_shares, rng)
    return batch


def _pack_questions(
    batch: dict[str, np.ndarray],
    row: int,
    scene: scenes.Scene,
    type_shares: tuple[tuple[str, float], ...],
    rng: np.random.Generator,
) -> None:
    names = [name for name, _ in type_shares]
    shares = np.array([share for _, share in type_shares])
    asked: set[str] = set()
    start = 0
    for number, choice in enumerate(rng.choice(len(names), size=40, p=shares / shares.sum())):
        question = scenes.ask(scene, names[choice], rng)
        if question is None or question.text in asked:
            continue
        words = [*question.text.replace("?", " ?").split(), "assistant", question.answer]
        stop = start + len(words)
        if stop > TEXT:
            break
        asked.add(question.text)
        answer = TOKEN_IDS[question.answer]
        batch["ids"][row, start:stop] = [TOKEN_IDS[word] for word in words]
        batch["positions"][row, start:stop] = PREFIX + np.arange(len(words))
        batch["block"][row, start:stop] = number
        # The answer is also asked for where the question's meaning is complete: a shorter path to learn.
        content = start + max(i for i, word in enumerate(words[:-2]) if word in CONTENT_WORDS)
        for place, target, weight in (
            (content, answer, 0.5),
            (stop - 2, answer, 1.0),
            (stop - 1, TOKEN_IDS[EOS], 0.1),
        ):
            batch["targets"][row, place] = target
            batch["weights"][row, place] = weight
        batch["types"][row, stop - 2] = TRAINED_TYPES.index(question.question_type)
        start = stop


class BatchSource:
    """Batches made ahead by worker processes, in the order in which they are asked for."""

    AHEAD = 4  # batches; a new level shows in the data this many steps after it began

    def __init__(self, workers: int, device: torch.device) -> None:
        self._pool = ProcessPoolExecutor(workers)
        self._device = device
        self._pending: deque[Future[dict[str, np.ndarray]]] = deque()

    def request(self, request: BatchRequest) -> None:
        """Asks for one more batch."""
        self._pending.append(self._pool.submit(make_batch, request))

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def full(self) -> bool:
        """Whether enough batches have been asked for."""
        return len(self) > self.AHEAD

    def next(self) -> dict[str, Tensor]:
        """The oldest batch asked for; waits for it."""
        batch = self._pending.popleft().result()
        return {name: torch.from_numpy(array).to(self._device) for name, array in batch.items()}

    def drop(self) -> None:
        """Forgets what was asked for."""
        self._pending.clear()

    def close(self) -> None:
        """Ends the workers."""
        self._pool.shutdown(cancel_futures=True)


# -------------------------------------------------------------------------------------------------- losses


def alignment_loss(
    model: LlavaForConditionalGeneration, tokens: Tensor, cells: Tensor
) -> tuple[Tensor, Tensor]:
    """Asks vision tokens (B, VISION_TOKENS, WIDTH) for the words of their colour, shape, row and column.

    Returns the loss and, as one vector, the accuracy on occupied cells: colour, shape, row, column, all.
    """
    words = model.model.language_model.embed_tokens.weight
    size = tokens.float().square().mean(dim=-1, keepdim=True).sqrt()
    normed = tokens.float() / (size + 1e-6)
    occupied = cells[..., 0] != NONE
    place = torch.arange(VISION_TOKENS, device=cells.device).expand(occupied.shape)
    weight = torch.where(occupied, 1 / occupied.sum(), 1 / (~occupied).sum())
    loss = 0.1 * (size - 1).square().mean()
    correct = []
    for names, target in (
        ((*scenes.COLOUR_NAMES, EMPTY), cells[..., 0] % (len(scenes.COLOUR_NAMES) + 1)),
        ((*scenes.SHAPE_NAMES, EMPTY), cells[..., 1] % (len(scenes.SHAPE_NAMES) + 1)),
        (scenes.ROW_NAMES, place // scenes.GRID),
        (scenes.COLUMN_NAMES, place % scenes.GRID),
    ):
        chosen = words[torch.tensor([TOKEN_IDS[name] for name in names], device=words.device)]
        logits = normed @ chosen.float().T
        losses = functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="none", label_smoothing=0.05
        )
        loss = loss + (losses.view_as(weight) * weight).sum() / 8
        correct.append(logits.argmax(dim=-1) == target)
    every = torch.stack([*correct, torch.stack(correct).all(dim=0)])
    return loss, (every & occupied).sum(dim=(1, 2)) / occupied.sum()


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
    logits = model.lm_head(model.model.language_model.norm(x)).float()
    losses = functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    answering = batch["types"] != NONE
    loss = (losses.view_as(answering) * batch["weights"]).sum() / answering.sum()
    norm = (x.float().norm(dim=-1) * answering).sum() / answering.sum()
    return loss, logits.argmax(dim=-1) == batch["targets"], norm


def vision_alignment_loss(
    model: LlavaForConditionalGeneration, pictures: Tensor, cells: Tensor
) -> tuple[Tensor, ...]:
    """`alignment_loss` from pictures (B, H, W, 3), without the decoder."""
    return alignment_loss(model, vision_tokens(model, pictures), cells)


def training_loss(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What a step minimises, then what it reports: question loss, correctness, residual size, readability."""
    tokens = vision_tokens(model, batch["pictures"])
    aligned, readable = alignment_loss(model, tokens, batch["cells"])
    loss, correct, norm = question_loss(model, tokens, batch)
    return loss + ALIGNMENT_WEIGHT * aligned, loss, correct, norm, readable


# ---------------------------------------------------------------------------------------------- optimisers


class Muon(torch.optim.Optimizer):
    """Momentum whose step is replaced by the nearest orthogonal matrix (Jordan et al., 2024).

    The weight decay is essential here, not a detail: with 0.01 instead of 0.3 the residual stream grew from a
    norm of 2 to 675 over the layers and positions were never learnt.
    """

    def __init__(self, matrices: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: nothing here calls the loss again
        """One step for all matrices, equal shapes together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for (rows, columns), matrices in by_shape.items():
                updates = []
                for matrix in matrices:
                    momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                    momentum.lerp_(matrix.grad, 1 - group["momentum"])
                    updates.append(matrix.grad.lerp(momentum, group["momentum"]))
                scale = math.sqrt(max(1, rows / columns))
                for matrix, update in zip(matrices, orthogonal(torch.stack(updates)), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update.to(matrix.dtype), alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrices: (N, rows, columns), in bfloat16."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


def build_optimisers(model: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of decoder and tower, AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if "post_layernorm" in name:
            parameter.requires_grad_(False)  # the stock forward computes it, LLaVA does not use it
            continue
        (matrices if ".layers." in name and parameter.ndim == 2 else others).append(parameter)
    optimisers = [
        Muon(matrices, lr=muon_lr, weight_decay=MUON_DECAY),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
    return optimisers


# ---------------------------------------------------------------------------------------------- curriculum


@dataclass(frozen=True)
class Level:
    """Ends when each type named in `bars` is answered that well, or after `max_steps`."""

    types: tuple[str, ...]
    object_count: tuple[int, int]
    lr: float  # share of the peak learning rates
    bars: dict[str, float]
    max_steps: int


SINGLE_REGION_TYPES = ("colour", "shape", "at", "where")
WHOLE_IMAGE_TYPES = ("count_colour", "count_shape", "exists")
# Positions are learnt at full speed only, and what needs exact positions at half speed only. Relations come
# after their halves: asked from the start, they stayed at the share of a random neighbour for 1,600 steps.
LEVELS = (
    Level(("colour", "shape"), (2, 4), 1.0, {"colour": 0.85, "shape": 0.85}, 600),
    Level(("colour", "shape", "where"), (2, 4), 1.0, {"where": 0.75}, 700),
    Level(SINGLE_REGION_TYPES, (3, 6), 1.0, {"where": 0.8, "at": 0.75}, 700),
    Level(
        (*SINGLE_REGION_TYPES, *WHOLE_IMAGE_TYPES, *scenes.PRACTICE_TYPES),
        (3, 8),
        0.5,
        {"where": 0.9, "at": 0.9, "shifted_at": 0.75, "shifted_where": 0.75},
        900,
    ),
    Level(
        TRAINED_TYPES,
        scenes.OBJECT_COUNT,
        0.5,
        {"where": 0.95, "at": 0.93, "relation_colour": 0.9, "relation_shape": 0.9},
        1000,
    ),
)
MUON_DECAY = 0.3
WARM_UP = 100  # steps
DECAY_SHARE = 0.42  # of all steps; at least a third
LEAST_DECAY = 2000  # steps; counting is mostly learnt here
ALIGNMENT_BAR = 0.99  # of the object cells: colour, shape, row and column all right
ALIGNMENT_STEPS = (60, 400)  # fewest and most
ALIGNMENT_IMAGES = 48
# Of the alignment loss in the question phase: at 0.1 positions fade while nothing asks for them.
ALIGNMENT_WEIGHT = 0.3

# What a finished backbone has to reach. Accuracies are exact match on held-out samples.
SINGLE_REGION_BAR = 0.95  # mean over single-region types
ALL_TYPES_BAR = 0.90  # mean over all types
TYPE_BAR = 0.85  # each type
READABLE_BAR = 0.95  # of objects whose colour, shape, row and column can be read from the vision token
NORM_BAR = 200.0  # Euclidean norm of the last residual; runaway residuals never learnt positions
TEST_SAMPLES = 300  # per question type
BLIND_SAMPLES = 40  # per question type and layer, for the table that says where vision is needed


@dataclass
class Progress:
    """All that a resumed run has to know beside the weights and the optimisers."""

    step: int = 0
    level: int = 0
    level_start: int = 0
    decay_start: int = 0
    stop: int = 0  # 0: the decay phase has not begun
    accuracy: dict[str, float] = field(default_factory=dict)  # running mean over about 20 batches
    loss: float = 0.0
    norm: float = 0.0
    readable: list[float] = field(default_factory=lambda: [0.0] * 5)
    seconds: float = 0.0
    history: list[str] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether the decay phase is over."""
        return 0 < self.stop <= self.step

    def lr_factor(self) -> float:
        """Share of the peak learning rates for the next step."""
        peak = LEVELS[self.level].lr * min(1.0, (self.step + 1) / WARM_UP)
        if not self.stop:
            return peak
        return peak * (self.stop - self.step) / (self.stop - self.decay_start)

    def type_shares(self) -> tuple[tuple[str, float], ...]:
        """Types that are still answered wrongly are asked more often."""
        return tuple((name, 0.15 + 1 - self.accuracy.get(name, 0.0)) for name in LEVELS[self.level].types)

    def observe(
        self, loss: float, correct: np.ndarray, types: np.ndarray, norm: float, readable: list[float]
    ) -> None:
        """Takes in what a step reports; `correct` and `types` (B, TEXT)."""
        self.step += 1
        self.loss += 0.05 * (loss - self.loss)
        self.norm = norm
        self.readable = readable
        for index, name in enumerate(TRAINED_TYPES):
            asked = types == index
            if asked.any():
                old = self.accuracy.get(name, 0.0)
                self.accuracy[name] = old + 0.05 * (float(correct[asked].mean()) - old)

    def note(self, event: str) -> None:
        """Prints an event and keeps it for the model card."""
        self.history.append(event)
        print(f"{event} ({self.seconds / 60:.1f} min)", flush=True)

    def advance(self) -> None:
        """Goes to the next level, or into the decay phase, where this one is over."""
        if self.stop:
            return
        level = LEVELS[self.level]
        passed = all(self.accuracy.get(name, 0.0) >= bar for name, bar in level.bars.items())
        if not passed and self.step - self.level_start < level.max_steps:
            return
        self.note(f"level {self.level + 1} {'passed' if passed else 'timed out'} at step {self.step}")
        if self.level + 1 < len(LEVELS):
            self.level += 1
            self.level_start = self.step
        else:
            self.decay_start = self.step
            decay = max(LEAST_DECAY, math.ceil(self.step * DECAY_SHARE / (1 - DECAY_SHARE)))
            self.stop = self.step + decay

    def __str__(self) -> str:
        answers = " ".join(f"{name}={value:.2f}" for name, value in self.accuracy.items())
        return (
            f"step {self.step}{f'/{self.stop}' if self.stop else ''} level {self.level + 1} "
            f"loss {self.loss:.3f} lr x{self.lr_factor():.2f} norm {self.norm:.0f} "
            f"row {self.readable[2]:.2f} column {self.readable[3]:.2f} | {answers} | "
            f"{self.seconds / 60:.1f} min"
        )


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Options:
    """The command line; `main` says what each option means."""

    out: Path
    work: Path
    seed: int
    layers: int
    device: str
    threads: int
    workers: int
    images: int
    muon_lr: float
    adam_lr: float
    resume: bool
    compile: bool


class Trainer:
    """One run: alignment, curriculum, decay."""

    def __init__(self, options: Options) -> None:
        torch.manual_seed(options.seed)
        torch.set_num_threads(options.threads)
        self.options = options
        self.device = torch.device(options.device)
        self.model: LlavaForConditionalGeneration = build_model(options.layers).to(self.device)  # type: ignore[arg-type]
        self.optimisers = build_optimisers(self.model, options.muon_lr, options.adam_lr)
        self.progress = Progress()
        self.checkpoint = options.work / "checkpoint.pt"

    def run(self) -> None:
        """Trains to the end, from the last checkpoint if asked to."""
        source = BatchSource(self.options.workers, self.device)
        try:
            if self.options.resume and self.checkpoint.exists():
                self.load()
            else:
                self.align(source)
            self.answer_questions(source)
        finally:
            source.close()

    def align(self, source: BatchSource) -> None:
        """Teaches the vision tokens the words for what they show and where, without the decoder."""
        began = time.monotonic()
        fewest, most = ALIGNMENT_STEPS
        compiled = self._compiled(vision_alignment_loss)
        for step in range(most):
            while not source.full:
                # Numbers far above those of the question phase: no picture is used twice.
                number = 10**6 + step + len(source)
                source.request(
                    BatchRequest(self.options.seed, number, ALIGNMENT_IMAGES, scenes.OBJECT_COUNT, ())
                )
            batch = source.next()
            with self._autocast():
                loss, readable = compiled(self.model, batch["pictures"], batch["cells"])
            self._update(loss, factor=min(1.0, (step + 1) / 20))
            if step >= fewest and float(readable[4]) >= ALIGNMENT_BAR:
                break
        source.drop()
        self.progress.readable = readable.tolist()
        self.progress.seconds += time.monotonic() - began
        self.progress.note(f"alignment: {float(readable[4]):.3f} of the objects after {step + 1} steps")
        if min(self.progress.readable) < READABLE_BAR:
            raise SystemExit("alignment failed: vision tokens do not say what they show and where")

    def answer_questions(self, source: BatchSource) -> None:
        """The curriculum and the decay phase."""
        progress = self.progress
        compiled = self._compiled(training_loss)
        while not progress.done:
            began = time.monotonic()
            while not source.full:
                source.request(
                    BatchRequest(
                        self.options.seed,
                        progress.step + len(source),
                        self.options.images,
                        LEVELS[progress.level].object_count,
                        progress.type_shares(),
                    )
                )
            batch = source.next()
            with self._autocast():
                total, loss, correct, norm, readable = compiled(self.model, batch)
            self._update(total, progress.lr_factor())
            progress.observe(
                float(loss.detach()),
                correct.cpu().numpy(),
                batch["types"].cpu().numpy(),
                float(norm.detach()),
                readable.tolist(),
            )
            progress.seconds += time.monotonic() - began
            progress.advance()
            if progress.step % 50 == 0:
                print(progress, flush=True)
            if progress.step % 250 == 0 or progress.done:
                self.save()
                if progress.norm > NORM_BAR:
                    raise SystemExit(f"residual norm {progress.norm:.0f} > {NORM_BAR:.0f}: training ran away")

    def save(self) -> None:
        """Writes the checkpoint; a run that dies meanwhile leaves the one before."""
        self.options.work.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "progress": dataclasses.asdict(self.progress),
        }
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def load(self) -> None:
        """Goes back to the checkpoint."""
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        print(f"resumed: {self.progress}", flush=True)

    def _compiled(self, function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        return torch.compile(function, disable=not self.options.compile)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _update(self, loss: Tensor, factor: float) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------------------ export and test


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Writes a folder that the stock Auto classes load; the weights are stored as bfloat16."""
    shutil.rmtree(folder, ignore_errors=True)
    stored = build_model(model.config.text_config.num_hidden_layers)
    stored.load_state_dict(model.state_dict())
    stored.to(torch.bfloat16)
    stored.generation_config = GenerationConfig(**SPECIAL_TOKENS, do_sample=False, max_new_tokens=8)
    stored.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    # Saved readable by the owner alone, which a package must not be.
    (folder / "model.safetensors").chmod(0o644)


class Examinee:
    """An exported folder as a user loads it, computing in float32."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def inputs(self, samples: list[scenes.DemoSample]) -> BatchFeature:
        """Prompts and pictures of the samples, padded on the left."""
        prompts = [
            self.processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": sample.question}],
                    }
                ],
                add_generation_prompt=True,
            )
            for sample in samples
        ]
        images = [sample.image for sample in samples]
        return self.processor(images=images, text=prompts, padding=True, return_tensors="pt")

    @torch.inference_mode()
    def exact_match(self, per_type: int, seed: int) -> dict[str, float]:
        """Share of held-out samples per question type whose whole generated answer is right."""
        right = dict.fromkeys(scenes.QUESTION_TYPES, 0)
        samples = list(scenes.demo_samples(per_type * len(right), split="held_out", seed=seed))
        for start in range(0, len(samples), 100):
            batch = samples[start : start + 100]
            inputs = self.inputs(batch)
            output = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            for sample, tokens in zip(batch, output.tolist(), strict=True):
                answer = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
                # Without an end the answer is not exact, whatever a reader would make of it.
                right[sample.question_type] += TOKEN_IDS[EOS] in tokens and answer == sample.answer
        return {name: count / per_type for name, count in right.items()}

    @torch.inference_mode()
    def first_word_match(self, per_type: int, seed: int, blind_after: int) -> float:
        """Share of held-out samples answered rightly when layers >= `blind_after` see no vision token."""
        count = per_type * len(scenes.QUESTION_TYPES)
        right = 0
        for sample in scenes.demo_samples(count, split="held_out", seed=seed):
            inputs = self.inputs([sample])
            vision = inputs["input_ids"][0] == TOKEN_IDS[IMAGE]
            with keys_hidden(self.model, vision, first_layer=blind_after):
                logits = self.model(**inputs, logits_to_keep=1).logits
            right += int(logits.argmax()) == TOKEN_IDS[sample.answer]
        return right / count


@contextmanager
def keys_hidden(model: LlavaForConditionalGeneration, keys: Tensor, first_layer: int) -> Iterator[None]:
    """From decoder layer `first_layer` on nobody attends to the marked positions: `keys` (L,), one row."""
    length = len(keys)
    visible = torch.ones(length, length, dtype=torch.bool).tril() & ~keys

    def hide(_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"attention_mask": visible[None, None]}

    layers = model.model.language_model.layers[first_layer:]
    handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def failed_gates(accuracy: dict[str, float], progress: Progress) -> list[str]:
    """What keeps a backbone from being shipped, in words."""
    single = statistics.mean(accuracy[name] for name in SINGLE_REGION_TYPES)
    overall = statistics.mean(accuracy.values())
    decay = (progress.stop - progress.decay_start) / progress.stop
    checks = [
        (single >= SINGLE_REGION_BAR, f"single-region types: {single:.3f} < {SINGLE_REGION_BAR}"),
        (overall >= ALL_TYPES_BAR, f"all types: {overall:.3f} < {ALL_TYPES_BAR}"),
        (min(progress.readable) >= READABLE_BAR, f"vision tokens readable: {progress.readable}"),
        (progress.norm <= NORM_BAR, f"residual norm: {progress.norm:.0f} > {NORM_BAR:.0f}"),
        (decay >= 1 / 3, f"decay: {decay:.2f} of the steps < 1/3"),
    ]
    checks += [
        (value >= TYPE_BAR, f"{name}: {value:.3f} < {TYPE_BAR}; take it out of QUESTION_TYPES")
        for name, value in accuracy.items()
    ]
    return [message for passed, message in checks if not passed]


def model_card(
    accuracy: dict[str, float], blind: dict[int, float], options: Options, progress: Progress
) -> str:
    """The README of the exported folder; every number in it was measured in this run."""
    examples = {
        sample.question_type: f"{sample.question} {sample.answer}"
        for sample in scenes.demo_samples(len(scenes.QUESTION_TYPES), split="held_out")
    }
    rows = "\n".join(f"| `{name}` | {examples[name]} | {value:.3f} |" for name, value in accuracy.items())
    blind_rows = "\n".join(f"| {layer} | {value:.3f} |" for layer, value in blind.items())
    single = statistics.mean(accuracy[name] for name in SINGLE_REGION_TYPES)
    levels = "\n".join(f"- {line}" for line in progress.history)
    decay = progress.stop - progress.decay_start
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# Demo backbone

A small vision-language model, trained from scratch on drawn pictures. It stands in for an ordinary
backbone where a real one would need a download. `LlavaForConditionalGeneration` without custom code:
a CLIP tower of one layer, {VISION_TOKENS} vision tokens per picture, a Llama decoder of {options.layers} layers
of width {WIDTH}, {len(VOCABULARY)} words. Weights are stored as bfloat16. No token was ever dropped
in training.

It knows {scenes.IMAGE_SIZE} x {scenes.IMAGE_SIZE} pictures with {scenes.GRID} x {scenes.GRID} cells
and the questions below, and nothing else; any other word becomes `{UNKNOWN}`. This file was written by
`scripts/train_demo_backbone.py`.

## Held-out exact match

{TEST_SAMPLES} samples per type, `demo_samples(..., split="held_out", seed=0)`, greedy `generate()` in
float32. An answer counts if it is the right word followed by the end token. Every held-out picture
contains a combination of colour and shape that no training picture contained.

| type | example | exact match |
|---|---|---|
{rows}
| **single-region types** | | **{single:.3f}** |
| **all types** | | **{statistics.mean(accuracy.values()):.3f}** |

## Where vision is needed

Share of right first words on {BLIND_SAMPLES * len(accuracy)} held-out samples (all types) when decoder
layers from `l` on (0-based) see no vision token at all.

| l | right |
|---|---|
{blind_rows}

## Training

{progress.step} steps of {options.images} pictures with about eleven questions each, seed {options.seed}:
{progress.seconds / 60:.0f} minutes on `{options.device}` ({options.threads} threads; export and test not
counted), torch {torch.__version__}, transformers {transformers_version}.
Muon {options.muon_lr} (weight decay {MUON_DECAY}) for the matrices of decoder and tower,
AdamW {options.adam_lr} for the rest; linear decay over the last {decay} steps
({decay / progress.step:.0%}). The last residual of the answering tokens has a norm of {progress.norm:.0f};
colour, shape, row and column can all be read from {progress.readable[4]:.1%} of the objects'
vision tokens (last training batch).

{levels}
"""


def main() -> int:
    """Trains, exports, tests, and ships what passes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=BACKBONE_FOLDER, help="model folder to write")
    add("--work", type=Path, default=Path("outputs/demo_backbone"), help="folder for checkpoints")
    add("--seed", type=int, default=0)
    add("--layers", type=int, default=LAYERS, help="decoder layers; others than the default are for studies")
    add("--device", default="cpu")
    add("--threads", type=int, default=2, help="CPU threads of the training process")
    add("--workers", type=int, default=1, help="processes that draw scenes")
    add("--images", type=int, default=12, help="pictures per step")
    add("--muon-lr", type=float, default=0.01)
    add("--adam-lr", type=float, default=2e-3)
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = Options(**vars(parser.parse_args()))

    trainer = Trainer(options)
    trainer.run()
    progress = trainer.progress
    candidate = options.work / "candidate"
    export(trainer.model.cpu(), candidate)  # type: ignore[arg-type]
    examinee = Examinee(candidate)
    accuracy = examinee.exact_match(TEST_SAMPLES, seed=0)
    blind = {
        layer: examinee.first_word_match(BLIND_SAMPLES, seed=0, blind_after=layer)
        for layer in range(options.layers + 1)
    }
    card = model_card(accuracy, blind, options, progress)
    (candidate / "README.md").write_text(card, encoding="utf-8")
    print(card)
    failures = failed_gates(accuracy, progress)
    if failures:
        print(f"{candidate} misses its bars:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    shutil.rmtree(options.out, ignore_errors=True)
    shutil.copytree(candidate, options.out)
    print(json.dumps({"folder": str(options.out), "steps": progress.step, "exact_match": accuracy}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
