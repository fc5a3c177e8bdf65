"""The training run of the video demo backbone, and the progress through its levels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from transformers import PreTrainedModel

from schedule_finder.demo import clips
from scripts.demo_backbone.batches import BatchSource
from scripts.demo_backbone.curriculum import Level, Progress
from scripts.demo_backbone.trainer import Trainer
from scripts.demo_video.batches import make_clip_batch
from scripts.demo_video.losses import clip_alignment_loss, clip_training_loss
from scripts.demo_video.model import build_model, warm_start

# The demo backbone can look up what is named already. What is new is time, which the first level is about.
_LOOK_UPS = ("colour", "shape", "frame_colour", "frame_shape", "first_frame", "frame_exists")
CLIP_LEVELS = (
    Level(_LOOK_UPS, (4, 7), 0.5, {"frame_colour": 0.8, "frame_shape": 0.8, "first_frame": 0.7}, 300),
    Level(clips.CLIP_TYPES, clips.OBJECT_COUNT, 0.5, dict.fromkeys(clips.CLIP_TYPES, 0.8), 200),
)


@dataclass
class ClipProgress(Progress):
    """`Progress` through `CLIP_LEVELS`; ``readable`` has the frame as its sixth value."""

    readable: list[float] = field(default_factory=lambda: [0.0] * 6)

    levels: ClassVar[tuple[Level, ...]] = CLIP_LEVELS
    types: ClassVar[tuple[str, ...]] = clips.CLIP_TYPES
    least_decay: ClassVar[int] = 200
    decay_share: ClassVar[float] = 0.3
    warm_up: ClassVar[int] = 40

    def __str__(self) -> str:
        return f"{super().__str__()} | frame {self.readable[-1]:.2f} all {self.readable[4]:.2f}"


class ClipTrainer(Trainer):
    """One run from the demo backbone's weights: alignment, levels, decay."""

    progress_class = ClipProgress
    make_batch = staticmethod(make_clip_batch)
    alignment_loss = staticmethod(clip_alignment_loss)
    training_loss = staticmethod(clip_training_loss)
    alignment_images = 12
    alignment_objects = clips.OBJECT_COUNT
    save_every = 25

    def answer_questions(self, source: BatchSource) -> None:
        """As the demo backbone's, with tower and projector as the alignment left them."""
        for part in (self.model.model.vision_tower, self.model.model.multi_modal_projector):
            part.requires_grad_(False)
        super().answer_questions(source)

    def build(self) -> PreTrainedModel:
        """The model with the weights it starts from."""
        model = build_model(self.options.layers)
        warm_start(model)
        return model
