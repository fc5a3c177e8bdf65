"""Tower features of a fixed pool of scenes, rendered once and kept on disk: training never runs the tower."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from schedule_finder.samples.photo_assets import PhotoAssets
from schedule_finder.samples.photo_scenes import (
    TOKENS_PER_SIDE,
    PhotoScene,
    Split,
    draw_scene,
    render_scene,
    scene_generator,
)
from scripts.photo.assembly import PIXEL_MEAN, PIXEL_STD

VISION_TOKENS = TOKENS_PER_SIDE**2
FEATURES = 1280  # channels of the tower
SEED = 0  # of all training and calibration scenes
_RENDERED_AT_ONCE = 8


@dataclass(frozen=True)
class FeaturePool:
    """A file of float16 features ``[scenes, VISION_TOKENS, FEATURES]`` that grows; scene i has the number i."""

    folder: Path
    split: Split
    size: int

    def __post_init__(self) -> None:
        """Create the file where it is missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._file.exists():
            np.lib.format.open_memmap(
                self._file, "w+", np.float16, (self.size, VISION_TOKENS, FEATURES)
            ).flush()
            self._progress.write_text("0")

    @property
    def _file(self) -> Path:
        return self.folder / f"{self.split}-{self.size}.npy"

    @property
    def _progress(self) -> Path:
        return self._file.with_suffix(".done")

    def ready(self) -> int:
        """How many scenes have features."""
        return int(self._progress.read_text() or 0)

    def scene(self, number: int) -> PhotoScene:
        """The scene, without rendering it."""
        return draw_scene(scene_generator(self.split, SEED, number), self.split)

    def features(self, number: int) -> Tensor:
        """Features of one ready scene: float16 ``[VISION_TOKENS, FEATURES]``."""
        return torch.from_numpy(np.load(self._file, mmap_mode="r")[number].copy())

    @torch.inference_mode()
    def fill(self, tower: nn.Module, assets: PhotoAssets, until: int | None = None) -> None:
        """Render the scenes that are not ready yet and keep their features; can be stopped at any time."""
        features = np.load(self._file, mmap_mode="r+")
        until = min(until or self.size, self.size)
        for start in range(self.ready(), until, _RENDERED_AT_ONCE):
            stop = min(start + _RENDERED_AT_ONCE, until)
            pictures = [self._picture(number, assets) for number in range(start, stop)]
            found = tower(torch.stack([pixels(picture) for picture in pictures])).last_hidden_state
            features[start:stop] = found.flatten(2).transpose(1, 2).half().numpy()
            features.flush()
            partial = self._progress.with_suffix(".partial")
            partial.write_text(str(stop))
            partial.replace(self._progress)

    def _picture(self, number: int, assets: PhotoAssets) -> Image.Image:
        rng = scene_generator(self.split, SEED, number)
        return render_scene(draw_scene(rng, self.split), assets, rng)


def pixels(picture: Image.Image) -> Tensor:
    """The picture as the processor gives it: ``[3, height, width]``."""
    levels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
    return (levels - torch.tensor(PIXEL_MEAN)[:, None, None]) / torch.tensor(PIXEL_STD)[:, None, None]
