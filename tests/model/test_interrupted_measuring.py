"""A search and an evaluation that are killed again and again end as ones that were left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from pruning_runtime import Schedule
from schedule_finder.measuring.sensitivity_table import SensitivityTable
from schedule_finder.run.folder import Run
from tests.support.interrupted_measuring import units
from tests.support.tiny_folder import write_jsonl, write_qwen2_vl_folder

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tmp_path: Path, kills: int) -> None:
    """Images of many sizes, so that batches are padded: equal bits mean equal batches."""
    checkpoint = write_qwen2_vl_folder(tmp_path / "qwen")
    data = write_jsonl(tmp_path / "data", 40, sizes=True)
    command = [
        sys.executable, "-m", "tests.support.interrupted_measuring", checkpoint, data, tmp_path, kills, kills,
    ]  # fmt: skip
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["killed"] == kills
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")

    tables = [SensitivityTable.load(run.sensitivity) for run in (whole, killed)]
    assert tables[0].kl.tobytes() == tables[1].kl.tobytes()
    assert sorted(units(killed)) == sorted(units(whole))
    schedules = [Schedule.load(run.schedule).model_dump(exclude={"provenance"}) for run in (whole, killed)]
    assert schedules[0] == schedules[1]
    evaluations = [pd.read_csv(run.evaluation).drop(columns="prefill_ms") for run in (whole, killed)]
    pd.testing.assert_frame_equal(*evaluations, check_exact=True)
    assert len(evaluations[0]) > 10
    assert killed.evaluation_summary.read_text() == whole.evaluation_summary.read_text()
    assert killed.samples.read_text() == whole.samples.read_text()
    assert not killed.evaluation_parts.exists()
