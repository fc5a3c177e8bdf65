"""Exports the trained video model and tests the exported folder through `generate()`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BatchFeature, LlavaNextVideoForConditionalGeneration

from schedule_finder.demo import clips
from scripts.demo_backbone.exam import Examinee, store
from scripts.demo_video.model import build_model
from scripts.demo_video.vocabulary import TOKEN_IDS, VIDEO, build_processor


def export_video(model: LlavaNextVideoForConditionalGeneration, folder: Path) -> None:
    """Writes a folder that the stock Auto classes load; the weights are stored as bfloat16."""
    store(model, build_model(model.config.text_config.num_hidden_layers), build_processor(), folder)


class VideoExaminee(Examinee):
    """An exported folder as a user loads it, asked about clips."""

    types = clips.CLIP_TYPES
    samples = staticmethod(clips.clip_samples)
    vision_token = VIDEO
    token_ids = TOKEN_IDS

    def inputs(self, samples: list[Any]) -> BatchFeature:
        """Prompts and frames of the samples, padded on the left."""
        return self.processor(
            videos=[list(sample.frames) for sample in samples],
            text=self.prompts(samples, "video"),
            padding=True,
            return_tensors="pt",
            do_sample_frames=False,
        )
