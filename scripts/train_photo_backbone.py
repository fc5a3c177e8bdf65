"""Trains the photo backbone's projector and adapters.

    python -m scripts.train_photo_backbone                 # hours on one CPU core
    python -m scripts.train_photo_backbone --steps 4000    # a finished run goes on

Steps: (1) a child process renders a pool of scenes and keeps their tower features; (2) the projector is aligned
with the word embeddings of the objects' names; (3) projector and low-rank adapters learn to answer questions,
some twenty packed into one sequence per image. A checkpoint is written every few minutes; the same command goes
on from it after any stop. The best adapters so far are in ``adapters.safetensors`` in the working folder.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from schedule_finder.errors import InputError
from schedule_finder.samples.photo_assets import cache_folder, fetch_photographs, load_photographs
from schedule_finder.samples.photo_scenes import IMAGE_SIZE, scene_generator
from scripts.photo.assembly import build_model, build_processor, load_trained, save_trained
from scripts.photo.feature_pool import FeaturePool
from scripts.photo.packing import Packer, draw_questions
from scripts.photo.training import PhotoTrainer, accuracy_by_type, align_projector, exact_matches
from scripts.photo.weights import DECODER, TOWER, convert_tower, fetch_weights, load_decoder

QUESTIONS = {
    **{"at": 4, "where": 3, "exists": 3, "left": 3, "below": 3, "row": 2, "list": 1, "two_hop": 2},
}
"""Questions of each type that a training image is asked, at most."""
CHECKED = {kind: min(number, 2) for kind, number in QUESTIONS.items()}
FEATURE_DROPOUT = 0.1  # of the tower's features; the few backgrounds would be learnt by heart otherwise
WARM_UP = 30  # steps
DECAY_SHARE = 0.3  # of all steps, at the end: the learning rate falls to nothing
ALIGNMENT_STEPS, ALIGNMENT_SCENES = 600, 800


@dataclass
class Progress:
    """What a checkpoint holds besides the weights."""

    step: int = 0
    questions: int = 0
    seconds: float = 0.0
    best: float = 0.0


class Run:
    """One training run in a working folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.work
        self.progress = Progress()
        decoder, tokenizer = load_decoder(fetch_weights(DECODER, options.cache))
        tower = load_tower(options.cache)
        processor = build_processor(tokenizer)
        model = build_model(tower, decoder, processor.tokenizer)
        self.packer = Packer(processor.tokenizer)
        dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
        self.trainer = PhotoTrainer(model, options.rank, dtype)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.trainer.projector.parameters()), "base": options.projector_rate},
                {"params": self.trainer.adapter_parameters(), "base": options.adapter_rate},
            ],
            betas=(0.9, 0.98),
            weight_decay=0.01,
        )
        self.pool = FeaturePool(self.folder, "train", options.scenes)
        self.checked = FeaturePool(self.folder, "calibration", options.checked_scenes)

    @property
    def checkpoint(self) -> Path:
        """The file to resume from."""
        return self.folder / "checkpoint.pt"

    def prepare(self) -> None:
        """Resume, or start from given weights, or align the projector."""
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.trainer.load_trained(state["projector"], state["adapters"])
            self.optimizer.load_state_dict(state["optimizer"])
            rates = (self.options.projector_rate, self.options.adapter_rate)
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["base"] = rate
            self.progress = Progress(**state["progress"])
            self.report(f"resumed at step {self.progress.step}")
        elif self.options.start:
            self.trainer.load_trained(*load_trained(self.options.start))
        else:
            self.align()

    def align(self) -> None:
        """The alignment phase, on the first scenes of the pool."""
        scenes = min(ALIGNMENT_SCENES, self.options.scenes)
        self.wait_for(scenes)
        align_projector(
            self.trainer.projector,
            self.packer,
            self.trainer.decoder.embed_tokens.weight,
            torch.stack([self.pool.features(number) for number in range(scenes)]),
            [self.pool.scene(number) for number in range(scenes)],
            ALIGNMENT_STEPS,
            self.report,
        )

    def wait_for(self, scenes: int) -> None:
        """Wait until the child process has rendered ``scenes`` scenes."""
        while self.pool.ready() < scenes:
            time.sleep(5)

    def report(self, line: str) -> None:
        """Print a line and append it to the log of the working folder."""
        line = f"{time.strftime('%H:%M:%S')} {line}"
        print(line, flush=True)
        with (self.folder / "log.txt").open("a") as log:
            log.write(line + "\n")

    def save(self) -> None:
        """Write the checkpoint."""
        projector, adapters = self.trainer.trained()
        state = {
            "projector": projector,
            "adapters": adapters,
            "optimizer": self.optimizer.state_dict(),
            "progress": vars(self.progress),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def train(self) -> None:
        """All steps that are left."""
        saved = time.monotonic()
        losses: list[float] = []
        while self.progress.step < self.options.steps:
            started = time.monotonic()
            losses.append(self.step())
            self.progress.step += 1
            self.progress.seconds += time.monotonic() - started
            if self.progress.step % 10 == 0:
                mean = sum(losses) / len(losses)
                losses.clear()
                self.report(
                    f"step {self.progress.step}/{self.options.steps}: loss {mean:.3f}, "
                    f"{self.progress.questions} questions, {self.progress.seconds:.0f} s"
                )
            last = self.progress.step == self.options.steps
            if self.progress.step % self.options.check_every == 0 or last:
                self.check()
            if last or time.monotonic() - saved > self.options.save_every:
                self.save()
                saved = time.monotonic()

    def step(self) -> float:
        """One optimizer step; returns the loss per answer token."""
        rng = np.random.default_rng([1, self.progress.step])
        torch.manual_seed(self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate_factor(self.progress.step, self.options.steps)
        total = 0.0
        for _ in range(self.options.images_per_step):
            number = int(rng.integers(self.pool.ready()))
            questions = draw_questions(self.pool.scene(number), QUESTIONS, rng)
            packed = self.packer.pack(questions)
            features = functional.dropout(self.pool.features(number).float(), FEATURE_DROPOUT)
            logits, labels = self.trainer.answer_logits(features, packed)
            loss = functional.cross_entropy(logits, labels) / self.options.images_per_step
            loss.backward()
            total += loss.item()
            self.progress.questions += len(questions)
        nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def check(self) -> None:
        """Exact match on calibration scenes; keeps the adapters if they are the best so far."""
        results = []
        for number in range(self.checked.ready()):
            rng = scene_generator("calibration", 1, number)
            questions = draw_questions(self.checked.scene(number), CHECKED, rng)
            matches = exact_matches(self.trainer, self.packer, self.checked.features(number), questions)
            results += [
                (question.question_type, match) for question, match in zip(questions, matches, strict=True)
            ]
        by_type = accuracy_by_type(results)
        overall = sum(match for _, match in results) / max(1, len(results))
        parts = ", ".join(f"{kind} {100 * right / asked:.0f}" for kind, (right, asked) in by_type.items())
        self.report(
            f"step {self.progress.step}: exact match {100 * overall:.1f} % of {len(results)} ({parts})"
        )
        if overall >= self.progress.best:
            self.progress.best = overall
            save_trained(*self.trainer.trained(), self.folder / "adapters.safetensors")


def rate_factor(step: int, steps: int) -> float:
    """Share of the learning rate: rises, stays, then falls along half a cosine."""
    decay_start = steps * (1 - DECAY_SHARE)
    if step < decay_start:
        return min(1.0, (step + 1) / WARM_UP)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - decay_start) / (steps - decay_start)))


def load_tower(cache: Path) -> Any:
    """The converted tower."""
    state = torch.load(fetch_weights(TOWER, cache), map_location="cpu", weights_only=True)
    return convert_tower(state, IMAGE_SIZE)


def fill_pools(options: argparse.Namespace) -> None:
    """What the child process does: render scenes and keep their features."""
    os.nice(10)
    torch.set_num_threads(1)
    tower, assets = load_tower(options.cache), load_photographs(options.cache)
    train = FeaturePool(options.work, "train", options.scenes)
    train.fill(tower, assets, ALIGNMENT_SCENES)
    FeaturePool(options.work, "calibration", options.checked_scenes).fill(tower, assets)
    train.fill(tower, assets)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="downloads and photographs")
    parser.add_argument(
        "--work", type=Path, help="features and checkpoints; default: photo_training in the cache"
    )
    parser.add_argument("--start", type=Path, help="trained weights to start from, instead of the alignment")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--images-per-step", type=int, default=2)
    parser.add_argument("--scenes", type=int, default=4000, help="size of the pool of training scenes")
    parser.add_argument("--checked-scenes", type=int, default=24)
    parser.add_argument("--check-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--save-every", type=float, default=240, metavar="SECONDS")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--adapter-rate", type=float, default=8e-4)
    parser.add_argument("--projector-rate", type=float, default=4e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the frozen weights"
    )
    options = parser.parse_args(arguments)
    options.work = options.work or options.cache / "photo_training"
    return options


def main() -> int:
    """Run the command line; returns the exit status."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    try:
        fetch_photographs(options.cache)
        run = Run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    child = multiprocessing.get_context("spawn").Process(target=fill_pools, args=(options,), daemon=True)
    child.start()
    run.prepare()
    run.train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
