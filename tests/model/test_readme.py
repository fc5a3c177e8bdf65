"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.support.schedules import schedule_for
from tests.support.tiny_folder import write_qwen2_vl_folder

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the README's reader has: a model with its processor, a schedule file, images and prompts."""
    folder = write_qwen2_vl_folder(tmp_path_factory.mktemp("qwen"))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    schedule_file = folder / "4_schedule.json"
    schedule_for(model, (1, 0.5), (3, 0.25)).save(schedule_file)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    picture, video = (
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|vision_start|><|video_pad|><|vision_end|>",
    )
    one_image = f"user {picture} what is this ? assistant"
    return {
        "model": model,
        "processor": processor,
        "schedule_file": schedule_file,
        "image": image,
        "frames": rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8),
        "one_image": one_image,
        "two_images": f"user {picture} {picture} where is red ? assistant",
        "one_video": f"user {video} what is this ? assistant",
        "inputs": processor(images=image, text=one_image, return_tensors="pt"),
    }


def test_there_is_code_for_an_image_a_batch_and_a_video() -> None:
    assert len(BLOCKS) == 3


def test_the_code_runs_in_its_order(names: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert "after layer 1: kept" in printed
    tokens = names["record"].tokens_per_layer  # type: ignore[attr-defined]
    assert tokens[5][0] < tokens[0][0]
    assert names["answers"].shape[0] == 2  # type: ignore[attr-defined]
