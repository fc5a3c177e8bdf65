"""Where a run writes: a failed attempt binds nothing, and folders with data get no files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command_line import call
from tests.support.tiny_folder import write_jsonl, write_llava_folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_folder(tmp_path_factory.mktemp("outputs") / "llava")


def test_a_failed_attempt_does_not_bind_its_options(checkpoint: Path, tmp_path: Path) -> None:
    data, out = write_jsonl(tmp_path / "data", 12), tmp_path / "run"
    images = data.parent / "images"
    images.rename(data.parent / "moved")
    first = ("profile", checkpoint, "--dataset", data, "--eval-samples", 2, "--out", out)
    assert "samples cannot be used" in call(*first, "--samples", 8, code=2)
    (data.parent / "moved").rename(images)
    # The same options again: the samples that were skipped are tried again.
    other = ("profile", checkpoint, "--dataset", data, "--eval-samples", 3, "--out", out)
    assert call(*other, "--samples", 6)["done"] == 6
    assert json.loads((out / "run.json").read_text())["options"]["samples"] == 6
    # Work is never given up.
    assert "another samples 6" in call(*other, "--samples", 5, code=2)


def test_the_same_failed_attempt_tries_its_samples_again(checkpoint: Path, tmp_path: Path) -> None:
    data, out = write_jsonl(tmp_path / "data", 12), tmp_path / "run"
    (data.parent / "images").rename(data.parent / "moved")
    again = ("profile", checkpoint, "--dataset", data, "--samples", 8, "--eval-samples", 2, "--out", out)
    assert "samples cannot be used" in call(*again, code=2)
    (data.parent / "moved").rename(data.parent / "images")
    assert call(*again) == {"run": str(out), "done": 8, "skipped": 0}


def test_data_folders_get_no_files(checkpoint: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data", 12)
    before = sorted(path for path in data.parent.rglob("*"))
    for dataset, out in ((data.parent, data.parent), (data.parent, data.parent / "run"), (data, data.parent)):
        line = call("profile", checkpoint, "--dataset", dataset, "--samples", 8, "--out", out, code=2)
        assert f"--out {out}: " in line
        assert "choose another --out" in line
    assert sorted(path for path in data.parent.rglob("*")) == before
    below = ("profile", checkpoint, "--dataset", data, "--samples", 8, "--out", data.parent / "run")
    assert call(*below)["done"] == 8
