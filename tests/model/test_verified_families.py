"""The table that `adaptinfer-profile backbones` prints is what the tests run over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from pruning_runtime import find_backbone, pruned
from schedule_finder import pipeline
from schedule_finder.cli.commands import app
from schedule_finder.errors import InputError
from schedule_finder.models.verified_families import VERIFIED
from schedule_finder.profiling.engines.base import BatchLimits
from schedule_finder.profiling.engines.local import LocalEngine
from schedule_finder.run.folder import Run
from schedule_finder.samples import open_data
from schedule_finder.search import Search
from tests.support.tiny_backbones import tiny_backbone
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import FAMILIES

TESTED: dict[str, Any] = {**FAMILIES, **FAMILIES_A, **FAMILIES_B}


def test_every_tested_family_is_listed_and_no_other() -> None:
    assert list(VERIFIED) == list(TESTED)


@pytest.mark.parametrize("key", VERIFIED)
def test_a_row_says_what_the_instance_is(key: str) -> None:
    row, tiny = VERIFIED[key], TESTED[key]
    if not hasattr(transformers, row.model_class):
        assert row.since == "5.23"
        pytest.skip(f"transformers {transformers.__version__} has no {row.model_class}")
    model = tiny.build()
    backbone = find_backbone(model)
    assert type(model).__name__ == row.model_class
    assert dict(model.named_modules())[row.layers] is backbone.layers
    assert set(row.kinds) == set(backbone.layer_kinds)
    assert row.media == getattr(tiny, "modalities", ("image",))


def layers_that_score(config: Any) -> list[int]:
    """Decoder layers with attention and keys of their own, from the configuration alone."""
    text = config.get_text_config(decoder=True)
    count = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * count
    own = count - (getattr(text, "num_kv_shared_layers", None) or 0)
    return [
        layer for layer in range(own) if kinds[layer].endswith("_attention") and "linear" not in kinds[layer]
    ]


@pytest.mark.parametrize("key", VERIFIED)
def test_every_family_from_profile_to_pruned_generation(key: str, tmp_path: Path) -> None:
    """Profile, detection, schedule and pruned generation; stages use layers that have a profile."""
    if not hasattr(transformers, VERIFIED[key].model_class):
        pytest.skip(f"transformers {transformers.__version__} has no {VERIFIED[key].model_class}")
    loaded = tiny_backbone(TESTED[key], key)
    model, scoring = loaded.backbone.model, layers_that_score(loaded.backbone.model.config)
    data = open_data("demo")
    options = {"samples": 12, "eval_samples": 1, "seed": 0, "dataset": "demo", "columns": {}}
    run = Run.begin(tmp_path, "test", options)
    engine = LocalEngine(loaded, data, BatchLimits(samples=3))
    counts = pipeline.profile_step(run, engine, data, lambda _done, _total: None, report=pytest.fail)
    assert counts == {"done": 12, "skipped": 0}

    profile = run.profile.read()
    others = set(range(profile.num_layers)) - set(scoring)
    assert profile.layers == scoring
    assert set(profile.meta["left_out"]) == {str(layer) for layer in others}
    for values in profile.maps:
        assert values.shape[0] == len(scoring)
        assert (values.sum(1) > 0).all()
    masses = profile.curves["vision_mass"]
    assert masses.shape == (12, len(scoring))
    np.testing.assert_allclose(masses, [values.sum(1) for values in profile.maps], rtol=2e-3)

    document = pipeline.detect_step(run)
    assert document["layers"] == scoring
    # Nothing can leave before the first layer that scores: its share of the decoder is the smallest budget.
    least = (scoring[0] + 1) / profile.num_layers
    budget = least + 0.5 * (1 - least)
    search = Search(run)
    for solver in ("paper", "pyramid", "fitprune"):
        assert {stage.layer for stage in search.solve(budget, "processed", solver=solver).stages} <= set(
            scoring
        )
    schedule = pipeline.schedule_step(run, search, budget=budget, solver="retained").schedule
    assert schedule.budget is not None
    assert schedule.budget.processed == pytest.approx(budget, abs=0.01)
    assert {stage.layer for stage in schedule.stages} <= set(scoring)
    with pytest.raises(InputError, match=rf"out of reach.*at least {least:.3g}"):
        search.solve(0.9 * least, "processed", solver="retained")

    inputs = loaded.inputs(
        [data.load(engine_entry) for engine_entry in pipeline.read_entries(run.samples)[:2]]
    )
    vision = loaded.backbone.vision_mask(inputs["input_ids"])
    with torch.no_grad(), pruned(model, schedule, vision_mask=vision) as record:
        generated = loaded.generate(inputs, 3)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 3
    for stage, planned in zip(record.stages, schedule.stages, strict=True):
        assert stage.layer == planned.layer
        assert [len(kept) for kept in stage.kept_positions()] == [
            planned.kept(int(count)) for count in vision.sum(1)
        ]


def test_the_command_prints_the_table() -> None:
    result = CliRunner().invoke(app, ["backbones", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout.strip().splitlines()[-1])
    assert list(printed) == list(VERIFIED)
    assert printed["qwen3_5"]["reference"] == "compaction"
    assert printed["llava"]["reference"] == "masking"
    assert "Verified families" in result.stdout
