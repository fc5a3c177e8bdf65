"""Exact match of the built photo backbone on held-out scenes, through `generate`, by question type.

    python -m scripts.evaluate_photo_backbone                         # the backbone in the cache folder
    python -m scripts.evaluate_photo_backbone FOLDER --questions 600

    python -m scripts.evaluate_photo_backbone --packed                # four times faster, the same answers

Every scene has a held-out background and at least one held-out pair of an object and a cell; questions are
asked one at a time in the checkpoint's own prompt format. ``--packed`` asks all questions about a scene in one
sequence that keeps them apart, and compares with the likeliest tokens instead of generating them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from schedule_finder.errors import InputError
from schedule_finder.samples.photo_assets import PhotoAssets, cache_folder, load_photographs
from schedule_finder.samples.photo_questions import LEARNT_TYPES, QUESTION_TYPES, PhotoQuestion, ask
from schedule_finder.samples.photo_scenes import PhotoScene, Split, draw_scene, render_scene, scene_generator
from scripts.photo.feature_pool import pixels
from scripts.photo.packing import Packer
from scripts.photo.training import PhotoTrainer, accuracy_by_type, exact_matches

MAX_NEW_TOKENS = 48


def answers(model: Any, processor: Any, picture: Image.Image, questions: list[PhotoQuestion]) -> list[str]:
    """Greedy answers; the questions about one picture form one batch."""
    conversations = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        for question in questions
    ]
    prompts = [processor.apply_chat_template(one, add_generation_prompt=True) for one in conversations]
    inputs = processor(images=[picture] * len(prompts), text=prompts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        generated = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def questions_about(scene: PhotoScene, rng: Any, types: tuple[str, ...]) -> list[PhotoQuestion]:
    """One question of every type that the scene allows."""
    return [question for kind in types if (question := ask(scene, kind, rng)) is not None]


class PackedAnswers:
    """Exact match of questions about one picture in one sequence, in float32."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._tower = model.model.vision_tower
        self._trainer = PhotoTrainer(model, 1, torch.float32)  # untrained adapters change nothing
        self._packer = Packer(processor.tokenizer)

    def matches(self, picture: Image.Image, questions: list[PhotoQuestion]) -> list[bool]:
        """Whether each question is answered right."""
        with torch.inference_mode():
            features = self._tower(pixels(picture)[None]).last_hidden_state[0].flatten(1).T
        return exact_matches(self._trainer, self._packer, features, questions)


class GeneratedAnswers:
    """Exact match of answers from `generate`, one prompt for each question."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor

    def matches(self, picture: Image.Image, questions: list[PhotoQuestion]) -> list[bool]:
        """Whether each question is answered right."""
        given = answers(self._model, self._processor, picture, questions)
        return [answer == question.answer for answer, question in zip(given, questions, strict=True)]


def evaluate(
    folder: Path,
    assets: PhotoAssets,
    *,
    questions: int,
    seed: int,
    split: Split = "held_out",
    types: tuple[str, ...] = LEARNT_TYPES,
    packed: bool = False,
) -> dict[str, tuple[int, int]]:
    """Right answers and questions of each type, of exactly ``questions`` questions in all."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    answering = (PackedAnswers if packed else GeneratedAnswers)(model, processor)
    results: list[tuple[str, bool]] = []
    number = 0
    while left := questions - len(results):
        rng = scene_generator(split, seed, number)
        scene = draw_scene(rng, split)
        picture = render_scene(scene, assets, rng)
        asked = questions_about(scene, rng, types)[:left]
        matches = answering.matches(picture, asked)
        results += [(one.question_type, match) for one, match in zip(asked, matches, strict=True)]
        number += 1
    return accuracy_by_type(results)


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="default: photo_backbone in the cache")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="where the photographs are")
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--types", nargs="+", choices=QUESTION_TYPES, default=LEARNT_TYPES, help="default: all learnt"
    )
    parser.add_argument("--packed", action="store_true", help="all questions about a scene in one sequence")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        assets = load_photographs(options.cache)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = options.folder or options.cache / "photo_backbone"
    found = evaluate(
        folder,
        assets,
        questions=options.questions,
        seed=options.seed,
        types=tuple(options.types),
        packed=options.packed,
    )
    for kind, (right, asked) in found.items():
        print(f"{kind:8s} {right:4d} of {asked:4d}  {100 * right / max(1, asked):5.1f} %")
    right, asked = (sum(column) for column in zip(*found.values(), strict=True))
    print(f"{'all':8s} {right:4d} of {asked:4d}  {100 * right / asked:5.1f} %")
    print(json.dumps({"right": right, "asked": asked, "by_type": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
