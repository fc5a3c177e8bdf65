"""The embedded demo: a small trained backbone and the data set it answers questions about."""

from pathlib import Path

from schedule_finder.demo.scenes import QUESTION_TYPES, DemoSample, demo_samples

BACKBONE_FOLDER = Path(__file__).parent / "backbone"
"""A Hugging Face model folder (package data); `AutoModelForImageTextToText` and `AutoProcessor` load it."""

__all__ = ["BACKBONE_FOLDER", "QUESTION_TYPES", "DemoSample", "demo_samples"]
