"""Prompts with images and videos that the served model and the reference answer; drawn anew in every process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from schedule_finder.demo import demo_samples

STEPS = 6
"""Generated tokens."""
WHOLE = {"keep_ratio": 1.0, "scorer": "strided"}
RULES = ("strided", "divprune")


@dataclass(frozen=True)
class Request:
    """A prompt, its media, and the setting that it asks for; ``setting`` None: that of the server."""

    prompt: str
    images: Sequence[Image.Image] = ()
    video: np.ndarray | None = None
    fps: float = 2.0
    setting: dict[str, Any] | None = field(default_factory=lambda: dict(WHOLE))

    def for_vllm(self, *, settings: bool = True) -> dict[str, Any]:
        """The request as `LLM.generate` takes it; ``settings``: with its own setting."""
        data: dict[str, Any] = {}
        if self.images:
            data["image"] = list(self.images)
        if self.video is not None:
            data["video"] = [(self.video, video_metadata(self.video, self.fps))]
        options = {"mm_processor_kwargs": self.setting} if settings and self.setting else {}
        return {"prompt": self.prompt, "multi_modal_data": data, **options}


def video_metadata(video: np.ndarray, fps: float) -> dict[str, Any]:
    """Facts about a decoded video for vLLM and transformers."""
    return {
        "fps": fps,
        "duration": len(video) / fps,
        "total_num_frames": len(video),
        "frames_indices": list(range(len(video))),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }


def llava_requests(count: int = 24) -> list[Request]:
    """Questions of the demo, with every setting; some with two images."""
    samples = list(demo_samples(count, split="held_out", seed=0))
    found = []
    for sample in samples:
        prompt = f"<bos>user <image>{sample.question} assistant"
        settings = [WHOLE, *({"keep_ratio": r, "scorer": s} for s in RULES for r in (0.5, 0.22))]
        found += [Request(prompt, [sample.image], setting=setting) for setting in settings]
    for one, other in zip(samples[::2], samples[1::2], strict=True):
        prompt = f"<bos>user <image>{one.question} <image>{other.question} assistant"
        found += [Request(prompt, [one.image, other.image], setting=setting) for setting in _by_image(0.25)]
    return found


def qwen_requests(count: int = 10) -> list[Request]:
    """Tall, wide and square images, two images, and videos."""
    generator = np.random.default_rng(0)
    block = "<|vision_start|><|image_pad|><|vision_end|>"
    found = []
    for number in range(count):
        ask = f"what is this word{number} ? <|im_end|><|im_start|> assistant"
        single = [_image(generator, *generator.choice((56, 84, 112, 168, 280), 2))]
        settings = [WHOLE, *({"keep_ratio": r, "scorer": s} for s in RULES for r in (0.5, 0.22))]
        found += [
            Request(f"<|im_start|> user {block} {ask}", single, setting=setting) for setting in settings
        ]
        pair = [_image(generator, 112, 56), _image(generator, 56, 168)]
        prompt = f"<|im_start|> user {block} word1 {block} {ask}"
        found += [Request(prompt, pair, setting=setting) for setting in _by_image(0.5)]
        found += _videos(generator, ask)
    return found


def llava_next_requests(count: int = 10) -> list[Request]:
    """Images of two tiles, some of them padded, with image-newline tokens.

    No square ones: their thumbnail and their tile are equal, and rounding decides between equal tokens.
    """
    generator = np.random.default_rng(0)
    found = []
    for number in range(count):
        width, height = ((128, 64), (64, 128), (120, 50), (52, 100))[number % 4]
        image = _image(generator, height, width)
        prompt = f"<bos> user <image> what is this word{number} ? assistant"
        settings = [WHOLE, *({"keep_ratio": r, "scorer": s} for s in RULES for r in (0.5, 0.3))]
        found += [Request(prompt, [image], setting=setting) for setting in settings]
    return found


def qwen3_requests() -> list[Request]:
    """The images of `qwen_requests`."""
    return [request for request in qwen_requests(6) if request.video is None]


REQUESTS = {
    "llava": llava_requests,
    "qwen": qwen_requests,
    "llava_next": llava_next_requests,
    "qwen3": qwen3_requests,
}


def _by_image(ratio: float) -> list[dict[str, Any]]:
    """Settings of prompts with several images: the plug-in chooses within each, and so must the reference."""
    diverse = {"name": "divprune", "options": {"scope": "image"}}
    return [WHOLE, *({"keep_ratio": ratio, "scorer": scorer} for scorer in ("strided", diverse))]


def _videos(generator: np.random.Generator, ask: str) -> list[Request]:
    video = np.stack([np.asarray(_image(generator, 84, 112)) for _ in range(6)])
    prompt = f"<|im_start|> user <|vision_start|><|video_pad|><|vision_end|> {ask}"
    settings = [WHOLE, *({"keep_ratio": 0.3, "scorer": scorer} for scorer in RULES)]
    # Frames one position apart: later ones would be behind the text's position in transformers, but not in vLLM.
    return [Request(prompt, video=video, fps=4.0, setting=setting) for setting in settings]


def _image(generator: np.random.Generator, height: int, width: int) -> Image.Image:
    cells = generator.integers(0, 256, (max(height // 28, 2), max(width // 28, 2), 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((int(width), int(height)), Image.Resampling.NEAREST)
