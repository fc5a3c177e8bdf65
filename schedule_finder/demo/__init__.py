"""The embedded demos: small trained backbones for pictures and clips, and the data sets that they answer questions about."""

from pathlib import Path

from schedule_finder.demo.clips import CLIP_TYPES, ClipSample, clip_samples
from schedule_finder.demo.scenes import QUESTION_TYPES, DemoSample, demo_samples

BACKBONE_FOLDER = Path(__file__).parent / "backbone"
"""A Hugging Face model folder (package data); `AutoModelForImageTextToText` and `AutoProcessor` load it."""

VIDEO_BACKBONE_FOLDER = Path(__file__).parent / "video_backbone"
"""The same for clips."""
BACKBONE_FOLDERS = {"demo": BACKBONE_FOLDER, "demo-video": VIDEO_BACKBONE_FOLDER}
"""By the name of the backbone, which is also that of its data set."""

__all__ = [
    "BACKBONE_FOLDER",
    "BACKBONE_FOLDERS",
    "CLIP_TYPES",
    "QUESTION_TYPES",
    "VIDEO_BACKBONE_FOLDER",
    "ClipSample",
    "DemoSample",
    "clip_samples",
    "demo_samples",
]
