"""The commands on data sets as people have them: mixtures, videos, streams, and runs begun long ago."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from schedule_finder.cli.commands import app
from tests.support.command_line import call
from tests.support.tiny_folder import (
    write_jsonl,
    write_llava_folder,
    write_qwen2_vl_folder,
    write_video_jsonl,
)

ROOT = Path(__file__).parents[2]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "1_samples.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_mixture_goes_through_every_step(tmp_path: Path) -> None:
    checkpoint, out = write_qwen2_vl_folder(tmp_path / "qwen"), tmp_path / "run"
    images, videos = write_jsonl(tmp_path / "data", 12), write_video_jsonl(tmp_path / "clips", 12)
    call(
        "run", checkpoint, "--dataset", images, "--dataset", videos, "--samples", 16, "--eval-samples", 4, "--out", out,
        "--max-new-tokens", 2,
    )  # fmt: skip
    steps = json.loads((out / "run.json").read_text())["steps"]
    assert {step["state"] for step in steps.values()} == {"done"}
    assert {line["status"] for line in lines(out)} == {"done"}
    call("evaluate", out, "--max-new-tokens", 1)


def test_a_mixture_of_images_and_videos(tmp_path: Path) -> None:
    checkpoint = write_qwen2_vl_folder(tmp_path / "qwen")
    images, videos = write_jsonl(tmp_path / "data", 12), write_video_jsonl(tmp_path / "clips", 12)
    out = tmp_path / "run"
    arguments = (
        checkpoint,
        "--dataset",
        images,
        "--dataset",
        videos,
        "--frames",
        4,
        "--samples",
        16,
        "--out",
        out,
    )
    assert call("profile", *arguments, "--eval-samples", 4, "--batch-size", 4)["done"] == 16
    done = lines(out)
    assert {line["status"] for line in done if line["use"] == "calibration"} == {"done"}
    for use, count in (("calibration", 8), ("held_out", 2)):
        sources = [line["source"].partition("@")[0] for line in done if line["use"] == use]
        assert (sources.count("data"), sources.count("videos")) == (count, count)
    options = json.loads((out / "run.json").read_text())["options"]
    assert options["dataset"] == [str(images), str(videos)]
    assert options["columns"] == {
        "split": None, "image_column": None, "question_column": None, "answer_column": None, "frames": 4,
    }  # fmt: skip
    # A run goes on with the same options only.
    assert call("profile", *arguments, "--eval-samples", 4)["done"] == 16
    assert "another dataset" in call(
        "profile", checkpoint, "--dataset", images, "--frames", 4, "--samples", 16, "--eval-samples", 4,
        "--out", out, code=2,
    )  # fmt: skip
    assert "another columns" in call("profile", *arguments[:-4], "--samples", 16, "--frames", 3,
                                     "--eval-samples", 4, "--out", out, code=2)  # fmt: skip


def test_frames_reach_the_backbone(tmp_path: Path) -> None:
    """Twice the frames are twice the vision tokens."""
    checkpoint, videos = write_qwen2_vl_folder(tmp_path / "qwen"), write_video_jsonl(tmp_path / "clips", 6)
    tokens = []
    for frames in (2, 4):
        out = tmp_path / f"run{frames}"
        call("profile", checkpoint, "--dataset", videos, "--frames", frames, "--samples", 4, "--out", out)
        from schedule_finder.profiling.store import ProfileStore

        tokens.append(ProfileStore(out / "2_profile").read().mean_vision)
    assert tokens[1] == 2 * tokens[0] > 0


def test_a_backbone_without_videos_says_so(tmp_path: Path) -> None:
    checkpoint, videos = write_llava_folder(tmp_path / "llava"), write_video_jsonl(tmp_path / "clips", 6)
    message = call(
        "profile", checkpoint, "--dataset", videos, "--samples", 4, "--out", tmp_path / "run", code=2
    )
    assert "LlavaProcessor takes no videos; give frames as a list of images" in message


def test_a_stream_and_repaired_samples(tmp_path: Path) -> None:
    from PIL import Image

    checkpoint, data = write_llava_folder(tmp_path / "llava"), write_jsonl(tmp_path / "data", 60)
    for row in range(0, 60, 2):
        path = data.parent / "images" / f"{row}.png"
        Image.open(path).convert("I;16").save(path)
    out = tmp_path / "run"
    arguments = ("profile", checkpoint, "--dataset", data, "--streaming", "--samples", 8, "--eval-samples", 2,
                 "--out", out)  # fmt: skip
    assert call(*arguments) == {"run": str(out), "done": 8, "skipped": 0} | call(*arguments)
    done = [line for line in lines(out) if line["use"] == "calibration"]
    assert all(line["row"] < 40 for line in done)  # four rows for each sample that was asked for
    for line in done:
        assert line["status"] == "done"
        assert line.get("reason") == (None if line["row"] % 2 else "repaired: 16-bit image scaled to 8 bits")


def test_a_run_begun_before_there_were_more_options_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    reference = json.loads((ROOT / "tests" / "data" / "run_before_more_options.json").read_text())
    reference["options"] |= {"samples": 4, "eval_samples": 2}
    reference["steps"] = {}
    out.mkdir()
    (out / "run.json").write_text(json.dumps(reference))
    assert call("profile", "demo", "--samples", 4, "--eval-samples", 2, "--out", out)["done"] == 4
    assert call("inspect", out)["options"]["dataset"] == "demo"


@pytest.mark.parametrize("command", ["run", "profile"])
def test_help_names_every_data_option(command: str) -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", CliRunner().invoke(app, [command, "--help"]).output)
    for option in ("--dataset", "--dataset-config", "--split", "--streaming", "--image-column", "--video-column",
                   "--question-column", "--question-template", "--answer-column", "--frames"):  # fmt: skip
        assert option in text
