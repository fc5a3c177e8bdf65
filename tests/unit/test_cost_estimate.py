"""The table of time and memory is computed from the shapes of the stock classes, and the guide shows what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from pruning_runtime.backbone import find_backbone
from pruning_runtime.costs import prefill_flops
from schedule_finder.models.cost_estimate import MODELS, Job, Model, Rates, estimate
from schedule_finder.models.shapes import shapes

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guide.md"


def stock(model: Model) -> torch.nn.Module:
    """The stock class of that size, without memory for its weights."""
    settings = dict(shapes()["qwen2-vl-7b"]["config"])
    shape = model.decoder
    text = settings["text_config"] | {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "tie_word_embeddings": model.tied,
    }
    vision = settings["vision_config"] | {"hidden_size": shape.hidden_size}
    settings |= {"text_config": text, "vision_config": vision, "tie_word_embeddings": model.tied}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_shapes_and_weights_are_those_of_the_stock_class(model: Model) -> None:
    built = stock(model)
    assert sum(one.numel() for one in built.parameters()) == pytest.approx(model.parameters, rel=2e-3)
    tower = sum(one.numel() for one in built.model.visual.parameters())
    assert tower == pytest.approx(model.tower.parameters, rel=5e-3)
    tokens = [1000] * model.decoder.num_layers
    assert prefill_flops(model.decoder, tokens) == prefill_flops(find_backbone(built).shape, tokens)


def test_time_and_memory_follow_from_the_rates() -> None:
    """A job of one sample with a negligible answer, by hand: 7B, 100 vision tokens and no others."""
    model = MODELS[1]
    job = Job(vision_tokens=100, other_tokens=0, samples=1, held_out=1, methods=1, new_tokens=0, batch_size=1)
    slow, fast = (estimate(model, job, Rates(flops=rate)) for rate in (1e12, 4e12))
    # A multiply-add per weight and token; the LM head and the embeddings are not in the layers.
    decoder = model.parameters - model.tower.parameters - 2 * 152064 * 3584
    attention = 28 * 4 * 28 * 128 * (100 * 101 / 2)
    assert slow.prefill_flops == pytest.approx(2 * 100 * decoder + attention)
    patches = 400
    tower = 32 * (2 * patches * 12 * 1280**2 + 4 * patches**2 * 1280)
    assert slow.profile_seconds == pytest.approx((slow.prefill_flops + tower) / 1e12)
    assert slow.profile_seconds == pytest.approx(4 * fast.profile_seconds)
    assert slow.cache == 100 * 2 * 4 * 128 * 28 * 2
    assert slow.weights == 2 * model.parameters
    longer = estimate(model, Job(100, 0, 1, 1, 1, 10, 1), Rates(flops=1e12, bandwidth=1e12))
    token = (longer.weights + longer.cache) / 1e12
    assert longer.evaluate_seconds - slow.evaluate_seconds == pytest.approx(10 * token)
    assert estimate(model, job, Rates(gpu_bytes=slow.peak / 2.5)).gpus == 3


def test_the_guide_shows_the_table_that_the_command_prints() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.cost_table"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Computed, not measured" in done.stdout
    assert done.stdout.strip() in GUIDE.read_text(encoding="utf-8")
