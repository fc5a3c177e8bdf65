"""Training batches: pictures with packed questions, made ahead by worker processes."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from schedule_finder.demo import scenes
from scripts.demo_backbone.vocabulary import (
    CONTENT_WORDS,
    EOS,
    NONE,
    PAD,
    PREFIX,
    TEXT,
    TOKEN_IDS,
    TRAINED_TYPES,
    VISION_TOKENS,
)


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
