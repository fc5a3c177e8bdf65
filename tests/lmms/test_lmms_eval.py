"""The real lmms-eval on local tasks, with the demo backbone; `make test-lmms` makes the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval")

from pruning_runtime import Schedule
from pruning_runtime.costs import processed_ratios
from schedule_finder.lmms_eval.demo_tasks import GROUP, write_tasks
from schedule_finder.lmms_eval.recording import agreement, read_records

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BACKBONE = ROOT / "schedule_finder" / "demo" / "backbone"
SCHEDULE = ROOT / "outputs" / "reference" / "4_schedule.json"
TASKS = (f"{GROUP}_open", f"{GROUP}_yes_no")
ITEMS, LAYERS, VISION = 8, 12, 64


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The local tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, ITEMS)
    return folder


def lmms_eval(tasks: Path, out: Path, **given: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line of lmms-eval on both tasks."""
    arguments = {"base": "llava_hf", "pretrained": BACKBONE, "dtype": "float32", **given}
    return subprocess.run(
        [
            sys.executable, "-m", "lmms_eval", "--model", "adaptinfer",
            "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
            "--include_path", str(tasks), "--tasks", ",".join(TASKS), "--device", "cpu", "--batch_size", "1",
            "--output_path", str(out), "--log_samples",
        ],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip


def scores(out: Path) -> dict[str, dict[str, float]]:
    """The results that lmms-eval wrote, by task and metric."""
    (path,) = out.rglob("*_results.json")
    found = json.loads(path.read_text())["results"]
    return {
        task: {key.partition(",")[0]: value for key, value in row.items() if isinstance(value, float)}
        for task, row in found.items()
    }


def test_two_tasks_with_and_without_a_schedule(tasks: Path, tmp_path: Path) -> None:
    full = lmms_eval(tasks, tmp_path / "full", baseline="full", record=tmp_path / "full.json")
    assert full.returncode == 0, full.stdout + full.stderr
    ours = lmms_eval(
        tasks,
        tmp_path / "ours",
        schedule=SCHEDULE,
        record=tmp_path / "ours.json",
        full=tmp_path / "full.json",
    )
    assert ours.returncode == 0, ours.stdout + ours.stderr

    before, after = scores(tmp_path / "full"), scores(tmp_path / "ours")
    assert before[TASKS[0]]["vqa_accuracy"] > 0.8  # the demo backbone answers nearly everything
    assert {"yes_no", "precision", "recall", "f1", "yes_share"} <= set(after[TASKS[1]])

    whole, pruned = read_records(tmp_path / "full.json"), read_records(tmp_path / "ours.json")
    schedule = Schedule.load(SCHEDULE)
    expected = VISION * sum(processed_ratios(schedule.stages, LAYERS)) / LAYERS
    for task in TASKS:
        assert len(pruned[task].prompts) == len(pruned[task].answers) == ITEMS
        first, second = whole[task].means(), pruned[task].means()
        assert first["vision_tokens"] == first["computed"] == second["vision_tokens"] == VISION
        assert second["computed"] == pytest.approx(expected, rel=0.05)  # counts are rounded, scoring is added
        assert second["flops"] < 0.8 * first["flops"]
        assert second["kv_bytes"] < 0.8 * first["kv_bytes"]
        assert f"adaptinfer: {task}: " in ours.stdout
        assert f"{100 * agreement(pruned[task], whole[task]):.1f} % equal answers" in ours.stdout


def test_what_cannot_be_run_writes_no_scores(tasks: Path, tmp_path: Path) -> None:
    """A schedule for another backbone; nothing is scored as an empty answer."""
    result = lmms_eval(tasks, tmp_path / "out", schedule="fastv/llava-1.5-7b")
    assert "32" in result.stdout + result.stderr
    assert not list((tmp_path / "out").rglob("*_results.json"))


def test_the_plug_in_is_registered() -> None:
    from lmms_eval.models import get_model, get_model_manifest

    path = get_model_manifest("adaptinfer").chat_class_path
    assert f"{get_model('adaptinfer').__module__}.{get_model('adaptinfer').__name__}" == path
