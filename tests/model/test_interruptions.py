"""A profile that is killed again and again ends as one that was left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from schedule_finder.run.folder import Run
from tests.support.stored_profiles import assert_equal, ids_of
from tests.support.tiny_folder import write_jsonl, write_qwen2_vl_folder

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("kills", "samples"), [(3, 100), pytest.param(20, 1000, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tmp_path: Path, kills: int, samples: int) -> None:
    """Images of many sizes, so that batches are padded: equal bits mean equal batches."""
    checkpoint = write_qwen2_vl_folder(tmp_path / "qwen")
    data = write_jsonl(tmp_path / "data", samples + 2, sizes=True)
    (data.parent / "images" / "7.png").write_text("not an image")
    command = [
        sys.executable,
        "-m",
        "tests.support.interrupted_profile",
        checkpoint,
        data,
        tmp_path,
        samples,
        kills,
        kills,
    ]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["killed"] == kills
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    stored = killed.profile.ids()
    assert len(stored) == len(set(stored)) == len(ids_of(whole)) - 1
    assert killed.samples.read_text() == whole.samples.read_text()
    assert_equal(killed.profile.read(), whole.profile.read())
