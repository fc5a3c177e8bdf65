"""Checkpoint folders: what loads, what its inputs look like, and what is wrong with those that do not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pruning_runtime import pruned
from schedule_finder.errors import InputError
from schedule_finder.models.loading import load_backbone
from schedule_finder.profiling.capture import profile_batch
from schedule_finder.samples import Sample
from tests.support.schedules import schedule_for
from tests.support.tiny_folder import write_llava_folder, write_qwen2_vl_folder


def sample(name: str, question: str, *sizes: tuple[int, int]) -> Sample:
    rng = np.random.default_rng(len(question))
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    return Sample(name, tuple(images), question, "red")


def test_a_folder_with_dynamic_resolution(tmp_path: Path) -> None:
    """Qwen2-VL's real processor: vision tokens differ from image to image, several images per row."""
    loaded = load_backbone(str(write_qwen2_vl_folder(tmp_path)))
    samples = [
        sample("a", "what is this ?", (32, 32)),
        sample("b", "where ?", (16, 32)),
        sample("c", "what is red left right ?", (32, 32), (16, 16)),
    ]
    inputs = loaded.inputs(samples)
    assert {"mm_token_type_ids", "image_grid_thw"} <= set(inputs)
    rows = profile_batch(loaded.backbone, inputs)
    grids = inputs["image_grid_thw"].prod(1) // 4
    assert [row.num_vision for row in rows] == [int(grids[0]), int(grids[1]), int(grids[2] + grids[3])]
    assert len({row.num_vision for row in rows}) == 3
    with pruned(loaded.backbone.model, schedule_for(loaded.backbone.model, (1, 0.5))) as record:
        output = loaded.backbone.model.generate(**inputs, max_new_tokens=2)
    assert output.shape[0] == 3
    assert record.stages[0].keep == tuple(int(row.num_vision * 0.5 + 0.5) for row in rows)


def test_a_row_of_a_batch_is_profiled_as_alone(tmp_path: Path) -> None:
    loaded = load_backbone(str(write_llava_folder(tmp_path)))
    samples = [sample("a", "what is this ?", (16, 16)), sample("b", "where is red left right ?", (20, 12))]
    together = profile_batch(loaded.backbone, loaded.inputs(samples))
    for one, row in zip(samples, together, strict=True):
        (alone,) = profile_batch(loaded.backbone, loaded.inputs([one]))
        for name, values in row.scores.items():
            # LLaVA's own forward numbers positions from the padding on; only their differences count.
            np.testing.assert_allclose(values, alone.scores[name], atol=1e-5, rtol=1e-4)


def test_identity_names_the_folder_and_its_shape(tmp_path: Path) -> None:
    folder = write_llava_folder(tmp_path / "mine")
    identity = load_backbone(str(folder)).identity
    assert (identity.name, identity.model_type, identity.num_layers) == (str(folder), "llava", 6)
    again = load_backbone(str(write_llava_folder(tmp_path / "other", seed=1))).identity
    assert identity.config_digest == again.config_digest
    assert identity.config_digest.startswith("sha256:")


def test_dtype(tmp_path: Path) -> None:
    folder = str(write_llava_folder(tmp_path))
    assert load_backbone(folder).dtype == torch.float32
    assert load_backbone(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_folders_that_do_not_load(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        load_backbone(str(tmp_path))
    folder = write_llava_folder(tmp_path / "a")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="does not load"):
        load_backbone(str(folder))
    folder = write_llava_folder(tmp_path / "b")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match=r"has no vision tower \(model_type 'bert'\)"):
        load_backbone(str(folder))
    folder = write_llava_folder(tmp_path / "c", template=False)
    loaded = load_backbone(str(folder))
    with pytest.raises(InputError, match="no chat template"):
        loaded.inputs([sample("a", "what ?", (16, 16))])
