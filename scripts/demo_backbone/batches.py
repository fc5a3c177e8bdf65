"""Training batches: pictures with packed questions, made ahead by worker processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from schedule_finder.demo import scenes
from schedule_finder.demo.draws import scene_rng
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

    The arrays of `empty_text`; `cells` (B, VISION_TOKENS, 2): the colour and shape in each cell.
    """
    images = request.images
    batch = {
        "pictures": np.empty((images, scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3), np.uint8),
        "cells": np.full((images, VISION_TOKENS, 2), NONE, np.int64),
        **empty_text(images),
    }
    for row in range(images):
        rng = scene_rng("train", request.seed, request.step * images + row)
        scene = scenes.draw_scene(rng, "train", request.object_count)
        batch["pictures"][row] = scenes.render_scene(scene, rng)
        for one in scene.objects:
            batch["cells"][row, one.region] = one.combination
        if request.type_shares:
            pack_questions(batch, row, partial(_ask, scene, rng), request.type_shares, rng, DEMO_WORDS)
    return batch


def _ask(scene: scenes.Scene, rng: np.random.Generator, name: str) -> scenes.Question | None:
    return scenes.ask(scene, name, rng)


def empty_text(rows: int) -> dict[str, np.ndarray]:
    """Arrays (rows, TEXT) for packed questions.

    `targets` and `weights` say what each token has to predict and how much that counts; `types` holds the question
    type at the token that predicts the answer.
    """
    shape = (rows, TEXT)
    return {
        "ids": np.full(shape, TOKEN_IDS[PAD], np.int64),
        "positions": np.zeros(shape, np.int64),
        "block": np.full(shape, NONE, np.int64),
        "targets": np.zeros(shape, np.int64),
        "weights": np.zeros(shape, np.float32),
        "types": np.full(shape, NONE, np.int64),
    }


@dataclass(frozen=True)
class Words:
    """What packing must know of a vocabulary: token ids, length of the prefix, content words, question types."""

    token_ids: dict[str, int]
    prefix: int
    content: frozenset[str]
    types: tuple[str, ...]


DEMO_WORDS = Words(TOKEN_IDS, PREFIX, CONTENT_WORDS, TRAINED_TYPES)


def pack_questions(
    batch: dict[str, np.ndarray],
    row: int,
    ask: Callable[[str], scenes.Question | None],
    type_shares: tuple[tuple[str, float], ...],
    rng: np.random.Generator,
    words: Words,
) -> None:
    """Fills a row of `empty_text`'s arrays with questions; `ask` makes one of a type, or None."""
    names = [name for name, _ in type_shares]
    shares = np.array([share for _, share in type_shares])
    ids = words.token_ids
    asked: set[str] = set()
    start = 0
    for number, choice in enumerate(rng.choice(len(names), size=40, p=shares / shares.sum())):
        question = ask(names[choice])
        if question is None or question.text in asked:
            continue
        text = [*question.text.replace("?", " ?").split(), "assistant", question.answer]
        stop = start + len(text)
        if stop > TEXT:
            break
        asked.add(question.text)
        answer = ids[question.answer]
        batch["ids"][row, start:stop] = [ids[word] for word in text]
        batch["positions"][row, start:stop] = words.prefix + np.arange(len(text))
        batch["block"][row, start:stop] = number
        # The answer is also asked for where the question's meaning is complete: a shorter path to learn.
        content = start + max(i for i, word in enumerate(text[:-2]) if word in words.content)
        for place, target, weight in (
            (content, answer, 0.5),
            (stop - 2, answer, 1.0),
            (stop - 1, ids[EOS], 0.1),
        ):
            batch["targets"][row, place] = target
            batch["weights"][row, place] = weight
        batch["types"][row, stop - 2] = words.types.index(question.question_type)
        start = stop


class BatchSource:
    """Batches made ahead by worker processes, in the order in which they are asked for."""

    AHEAD = 4  # batches; a new level shows in the data this many steps after it began

    def __init__(
        self,
        workers: int,
        device: torch.device,
        make: Callable[[BatchRequest], dict[str, np.ndarray]] = make_batch,
    ) -> None:
        self._make = make
        self._pool = ProcessPoolExecutor(workers)
        self._device = device
        self._pending: deque[Future[dict[str, np.ndarray]]] = deque()

    def request(self, request: BatchRequest) -> None:
        """Asks for one more batch."""
        self._pending.append(self._pool.submit(self._make, request))

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
