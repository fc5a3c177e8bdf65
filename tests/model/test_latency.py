"""Measuring latency on a small model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from schedule_finder.measuring.latency_model import MEASURED_RATIOS, LatencyModel, measure_latency
from schedule_finder.models.loading import load_backbone
from schedule_finder.samples import open_data
from schedule_finder.samples.choose import choose_samples
from tests.support.tiny_folder import write_jsonl, write_llava_folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[LatencyModel, int, int]:
    """The model's latency on a batch of three prompts, with their vision and other tokens."""
    folder: Path = tmp_path_factory.mktemp("latency")
    loaded = load_backbone(str(write_llava_folder(folder / "llava")), device="cpu")
    data = open_data(str(write_jsonl(folder / "data", 4)), seed=0)
    samples = [data.load(entry) for entry in choose_samples(data, 3, 0, 0)]
    inputs = loaded.inputs(samples)
    vision = int(loaded.backbone.vision_mask(inputs["input_ids"])[0].sum())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure_latency(loaded, inputs, "text_guided"), vision, inputs["input_ids"].shape[1] - vision
    finally:
        torch.set_num_threads(threads)


def test_times_are_positive_and_rise_with_tokens(measured: tuple[LatencyModel, int, int]) -> None:
    latency, _, _ = measured
    assert len(latency.tokens) == len(latency.layer_ms) == len(MEASURED_RATIOS)
    assert list(latency.tokens) == sorted(set(latency.tokens))
    assert list(latency.layer_ms) == sorted(latency.layer_ms)
    assert latency.layer_ms[0] > 0
    assert latency.stage_ms > 0
    assert (latency.batch_size, latency.device) == (3, "cpu")


def test_it_is_measured_from_text_alone_to_the_whole_prompt(
    measured: tuple[LatencyModel, int, int],
) -> None:
    latency, vision, others = measured
    # Questions differ in length; padding is no token of a prompt.
    assert latency.tokens[-1] - latency.tokens[0] == pytest.approx(vision)
    assert 0 < latency.tokens[0] <= others
