"""Every error is one line on stderr and nothing else, with the right exit code."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from schedule_finder.cli.commands import app
from tests.support.command_line import runner
from tests.support.tiny_folder import write_jsonl, write_llava_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("errors")
    return {"checkpoint": write_llava_folder(folder / "llava"), "data": write_jsonl(folder / "data", 12)}


def error_of(*arguments: Any, code: int = 2) -> str:
    """All that a failing command prints to stderr, which must be one line."""
    result = runner.invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def profile(made: dict[str, Path], checkpoint: Any, tmp_path: Path, *more: Any) -> str:
    return error_of(
        "profile", checkpoint, "--dataset", made["data"], "--samples", 4, "--out", tmp_path / "run", *more
    )


def test_a_hub_name_without_network(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A real attempt. Retries of the libraries would be logged."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: False)
    with caplog.at_level(logging.DEBUG):
        line = profile(made, "nobody/no-such-model", tmp_path)
        assert "the hub cannot be reached" in line
        data = error_of(
            "profile", made["checkpoint"], "--dataset", "nobody/no-such-data", "--out", tmp_path / "run"
        )
        assert "cannot be read" in data
    assert "Retrying" not in caplog.text


def test_a_text_only_model(made: dict[str, Path], tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    assert "has no vision tower (model_type 'llama')" in profile(made, tmp_path / "llama", tmp_path)


def test_a_wrong_width(made: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = shutil.copytree(made["checkpoint"], tmp_path / "llava")
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["hidden_size"] = 96
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert "in the checkpoint, 96 in the configuration" in profile(made, checkpoint, tmp_path)


def test_dtype_and_values_of_options(made: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = made["checkpoint"]
    assert "error: --dtype 'int3': choose auto, float32" in profile(
        made, checkpoint, tmp_path, "--dtype", "int3"
    )
    kernel = profile(made, checkpoint, tmp_path, "--attn-implementation", "magic")
    assert "--attn-implementation 'magic': choose sdpa, eager" in kernel
    assert "--load-in '3bit': choose 4bit, 8bit" in profile(made, checkpoint, tmp_path, "--load-in", "3bit")
    assert "needs bitsandbytes" in profile(made, checkpoint, tmp_path, "--load-in", "4bit")
    assert "write KEY=VALUE" in profile(made, checkpoint, tmp_path, "--processor-arg", "pixels")
    assert "LlavaProcessor has no argument 'size_of'" in profile(
        made, checkpoint, tmp_path, "--processor-arg", "size_of=3"
    )


def test_usage_errors(tmp_path: Path) -> None:
    assert "No such option: --sample" in error_of("profile", "demo", "--sample", 3)
    assert "No such command 'profil'" in error_of("profil")
    assert "Invalid value for '--batch-size'" in error_of("profile", "demo", "--batch-size", "x")
    assert "Missing argument" in error_of("detect")
    assert "requires an argument" in error_of("profile", "--out")


def test_a_missing_schedule(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = runner.invoke(
        app,
        ["profile", *map(str, (made["checkpoint"], "--dataset", made["data"], "--samples", 8, "--out", out))],
    )
    assert done.exit_code == 0, done.stderr
    line = error_of("evaluate", out)
    assert "4_schedule.json" in line
    assert f"adaptinfer-profile schedule {out}" in line


def test_an_unreadable_data_file(made: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "data.jsonl"
    broken.write_text('{"image": "a.png", "question"')
    line = error_of("profile", made["checkpoint"], "--dataset", broken, "--out", tmp_path / "run")
    assert "cannot be read" in line


@pytest.mark.parametrize("form", ["absolute", "relative"])
def test_images_outside_the_folder_need_an_option(made: dict[str, Path], tmp_path: Path, form: str) -> None:
    data = tmp_path / "data" / "data.jsonl"
    data.parent.mkdir()
    images = made["data"].parent / "images"
    if form == "relative":
        shutil.copytree(images, tmp_path / "images")
    lines = [json.loads(line) for line in made["data"].read_text().splitlines()]
    for number, line in enumerate(lines):
        line["image"] = str(images / f"{number}.png") if form == "absolute" else f"../images/{number}.png"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = (
        "profile",
        made["checkpoint"],
        "--dataset",
        data,
        "--samples",
        8,
        "--eval-samples",
        2,
        "--out",
    )
    result = runner.invoke(app, [*map(str, (*arguments, tmp_path / "run"))])
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "outside the data set's folder" in line
    assert "--allow-outside-paths" in line
    allowed = runner.invoke(app, [*map(str, (*arguments, tmp_path / "run2", "--allow-outside-paths"))])
    assert allowed.exit_code == 0, allowed.stderr


@pytest.mark.parametrize("text", ["0", str(10**6), str(10**60)])
@pytest.mark.parametrize("command", ["run", "profile"])
def test_a_number_of_threads_that_no_machine_has(command: str, text: str, tmp_path: Path) -> None:
    line = error_of(command, "demo", "--threads", text, "--out", tmp_path / "run")
    assert "--threads" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["-1", str(2**32)])
def test_a_seed_that_no_generator_takes(text: str, tmp_path: Path) -> None:
    line = error_of("profile", "demo", "--seed", text, "--out", tmp_path / "run")
    assert "--seed" in line
    assert not (tmp_path / "run").exists()
