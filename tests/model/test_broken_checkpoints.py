"""Checkpoints that are not what their configuration says, and changes of a checkpoint between the steps of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from schedule_finder.cli.commands import app
from tests.support.command_line import call, runner
from tests.support.tiny_folder import write_jsonl, write_llava_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A complete checkpoint and a data file."""
    folder = tmp_path_factory.mktemp("source")
    return {"checkpoint": write_llava_folder(folder / "llava"), "data": write_jsonl(folder / "data", 12)}


def copy_of(source: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(source["checkpoint"], tmp_path / "llava")


def change_config(checkpoint: Path, part: str, **fields: Any) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    (config[part] if part else config).update(fields)
    path.write_text(json.dumps(config))


def change_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = checkpoint / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def profile(checkpoint: Path, data: Path, out: Path, *more: Any, code: int = 0) -> Any:
    return call(
        "profile", checkpoint, "--dataset", data, "--samples", 8, "--eval-samples", 2, "--out", out, *more, code=code
    )  # fmt: skip


def test_layers_without_weights_are_refused(source: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = copy_of(source, tmp_path)
    change_config(checkpoint, "text_config", num_hidden_layers=8)
    line = profile(checkpoint, source["data"], tmp_path / "run", code=2)
    assert "18 tensors missing (" in line  # two layers of nine tensors
    assert "language_model.layers.6.input_layernorm.weight" in line
    assert not (tmp_path / "run").exists()
    allowed = profile(checkpoint, source["data"], tmp_path / "run", "--allow-missing-weights")
    assert allowed["done"] == 8


def test_weights_without_layers_are_refused(source: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = copy_of(source, tmp_path)
    change_config(checkpoint, "text_config", num_hidden_layers=5)
    line = profile(checkpoint, source["data"], tmp_path / "run", code=2)
    assert "9 tensors unexpected (" in line
    assert "language_model.layers.5.input_layernorm.weight" in line


def test_a_wrong_width_is_one_line_and_cannot_be_allowed(source: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = copy_of(source, tmp_path)
    change_config(checkpoint, "text_config", hidden_size=96)
    for more in ((), ("--allow-missing-weights",)):
        line = profile(checkpoint, source["data"], tmp_path / "run", *more, code=2)
        assert "tensors of another shape (" in line
        assert "(48 in the checkpoint, 96 in the configuration)" in line
        assert "--allow" not in line


def test_a_tied_head_is_not_missing(source: dict[str, Path], tmp_path: Path) -> None:
    """Without the head, an untied model is incomplete, and a tied one complete."""
    checkpoint = copy_of(source, tmp_path)
    change_weights(checkpoint, lambda weights: weights.pop("language_model.lm_head.weight"))
    line = profile(checkpoint, source["data"], tmp_path / "run", code=2)
    assert "1 tensor missing (lm_head.weight)" in line
    change_config(checkpoint, "text_config", tie_word_embeddings=True)
    change_config(checkpoint, "", tie_word_embeddings=True)
    assert profile(checkpoint, source["data"], tmp_path / "run")["done"] == 8


def swap(weights: dict[str, torch.Tensor]) -> None:
    """Exchange the weights of two layers."""
    one = next(
        name for name in weights if name.endswith("layers.1.mlp.up_proj.weight") and "language" in name
    )
    other = one.replace("layers.1.", "layers.2.")
    weights[one], weights[other] = weights[other], weights[one]


@pytest.mark.parametrize("part", ["weights", "configuration"])
def test_a_changed_checkpoint_is_noticed_by_every_step(
    source: dict[str, Path], tmp_path: Path, part: str
) -> None:
    checkpoint, out = copy_of(source, tmp_path), tmp_path / "run"
    profile(checkpoint, source["data"], out)
    call("detect", out)
    call("schedule", out, "--solver", "retained")
    fingerprint = json.loads((out / "4_schedule.json").read_text())["backbone"]["fingerprint"]
    assert set(fingerprint) == {"configuration", "weights"}
    if part == "weights":
        change_weights(checkpoint, swap)
    else:
        rope = {"rope_theta": 500000.0, "rope_type": "default"}
        change_config(checkpoint, "text_config", rope_parameters=rope)
    resumed = profile(checkpoint, source["data"], out, code=2)
    for line in (resumed, call("schedule", out, code=2), call("evaluate", out, code=2)):
        assert f"the {part} of backbone" in line
        assert "changed since it was profiled" in line


def test_a_profile_without_a_fingerprint_goes_on_with_a_notice(
    source: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint, out = copy_of(source, tmp_path), tmp_path / "run"
    profile(checkpoint, source["data"], out)
    meta = json.loads((out / "2_profile" / "meta.json").read_text())
    del meta["backbone"]["fingerprint"]
    (out / "2_profile" / "meta.json").write_text(json.dumps(meta))
    arguments = ("--dataset", source["data"], "--samples", 8, "--eval-samples", 2, "--out", out)
    result = runner.invoke(app, ["profile", *map(str, (checkpoint, *arguments))])
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("without a fingerprint of the backbone") == 1
    call("detect", out)
    call("schedule", out, "--solver", "retained")


def test_a_dtype_is_not_a_change(source: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, out = copy_of(source, tmp_path), tmp_path / "run"
    profile(checkpoint, source["data"], out)
    call("detect", out)
    call("schedule", out, "--solver", "retained", "--dtype", "bfloat16")
