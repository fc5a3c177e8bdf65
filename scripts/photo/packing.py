"""Many questions about one image in one sequence, kept apart, so that each sees what it would see alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from schedule_finder.samples.photo_questions import PhotoQuestion, ask
from schedule_finder.samples.photo_scenes import PhotoScene
from scripts.photo.assembly import IMAGE_TOKEN, OPENING, answer_text, image_block, question_text

IGNORED = -100  # label of a position whose next token is not learnt


@dataclass(frozen=True)
class PackedQuestions:
    """One sequence: the image once, then every question with its answer.

    ``input_ids``, ``positions`` (restart at each question), ``labels`` (of the next token) and ``segments`` (0 for
    the image, then the question's number) are ``[length]``; ``vision`` marks the vision tokens.
    """

    input_ids: Tensor
    positions: Tensor
    labels: Tensor
    segments: Tensor
    vision: Tensor

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Additive attention mask ``[1, 1, length, length]``: causal, within a question and to the image."""
        order = torch.arange(len(self.segments))
        same = self.segments[:, None] == self.segments[None, :]
        allowed = (same | (self.segments[None, :] == 0)) & (order[:, None] >= order[None, :])
        return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[
            None, None
        ]


class Packer:
    """Tokenizes and packs; remembers the tokens of texts that recur."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.prefix = self.tokens(OPENING + image_block())

    @functools.lru_cache(maxsize=100_000)  # noqa: B019 - one packer lives as long as the run
    def tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of ``text``, without special tokens around it."""
        return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)

    def pack(self, questions: Sequence[PhotoQuestion]) -> PackedQuestions:
        """One sequence with all ``questions`` about one image."""
        ids, segments = list(self.prefix), [0] * len(self.prefix)
        positions, labels = list(range(len(self.prefix))), [IGNORED] * len(self.prefix)
        for number, question in enumerate(questions, start=1):
            asked, answer = (
                self.tokens(question_text(question.text)),
                self.tokens(answer_text(question.answer)),
            )
            # The last token of the answer ends the turn: nothing is predicted from it.
            ids += asked + answer
            labels += [IGNORED] * (len(asked) - 1) + list(answer) + [IGNORED]
            segments += [number] * (len(asked) + len(answer))
            positions += range(len(self.prefix), len(self.prefix) + len(asked) + len(answer))
        input_ids = torch.tensor(ids)
        return PackedQuestions(
            input_ids,
            torch.tensor(positions),
            torch.tensor(labels),
            torch.tensor(segments),
            input_ids == self._image_token,
        )


def draw_questions(
    scene: PhotoScene, numbers: dict[str, int], rng: np.random.Generator
) -> list[PhotoQuestion]:
    """Up to ``numbers[type]`` different questions of every type about ``scene``."""
    drawn = [ask(scene, kind, rng) for kind, number in numbers.items() for _ in range(number)]
    return list({question.text: question for question in drawn if question is not None}.values())
