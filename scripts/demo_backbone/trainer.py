"""One training run: alignment, curriculum, decay."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from schedule_finder.demo import scenes
from scripts.demo_backbone.batches import BatchRequest, BatchSource, make_batch
from scripts.demo_backbone.curriculum import (
    ALIGNMENT_BAR,
    ALIGNMENT_IMAGES,
    ALIGNMENT_STEPS,
    NORM_BAR,
    READABLE_BAR,
    Progress,
)
from scripts.demo_backbone.losses import training_loss, vision_alignment_loss
from scripts.demo_backbone.model import build_model
from scripts.demo_backbone.optimisers import build_optimisers, fast_bfloat16

if TYPE_CHECKING:
    from collections.abc import Callable


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

    progress_class: ClassVar[type[Progress]] = Progress
    make_batch = staticmethod(make_batch)
    alignment_loss = staticmethod(vision_alignment_loss)
    training_loss = staticmethod(training_loss)
    save_every: ClassVar[int] = 250
    alignment_images: ClassVar[int] = ALIGNMENT_IMAGES
    alignment_objects: ClassVar[tuple[int, int]] = scenes.OBJECT_COUNT

    def __init__(self, options: Options) -> None:
        torch.manual_seed(options.seed)
        torch.set_num_threads(options.threads)
        self.options = options
        self.device = torch.device(options.device)
        self.model: Any = self.build().to(self.device)
        self.optimisers = build_optimisers(self.model, options.muon_lr, options.adam_lr)
        self.progress = self.progress_class()
        self.checkpoint = options.work / "checkpoint.pt"

    def build(self) -> PreTrainedModel:
        """The model before the first step."""
        return build_model(self.options.layers)

    def run(self) -> None:
        """Trains to the end, from the last checkpoint if asked to."""
        source = BatchSource(self.options.workers, self.device, self.make_batch)
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
        compiled = self._compiled(self.alignment_loss)
        for step in range(most):
            while not source.full:
                # Numbers far above those of the question phase: no picture is used twice.
                number = 10**6 + step + len(source)
                source.request(
                    BatchRequest(self.options.seed, number, self.alignment_images, self.alignment_objects, ())
                )
            batch = source.next()
            with self._autocast():
                loss, readable = compiled(self.model, batch)
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
        compiled = self._compiled(self.training_loss)
        while not progress.done:
            began = time.monotonic()
            while not source.full:
                source.request(
                    BatchRequest(
                        self.options.seed,
                        progress.step + len(source),
                        self.options.images,
                        progress.levels[progress.level].object_count,
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
            if progress.step % min(50, self.save_every) == 0:
                print(progress, flush=True)
            if progress.step % self.save_every == 0 or progress.done:
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
        self.progress = self.progress_class(**state["progress"])
        print(f"resumed: {self.progress}", flush=True)

    def _compiled(self, function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        return torch.compile(function, disable=not self.options.compile)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=fast_bfloat16(self.device))

    def _update(self, loss: Tensor, factor: float) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
