"""The real lmms-eval on local tasks, with the demo backbone; `make test-lmms` makes the environment."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("lmms_eval")

from pruning_runtime import Schedule
from pruning_runtime.costs import processed_ratios
from schedule_finder.errors import InputError
from schedule_finder.evaluation.hard_subset import RIGHT
from schedule_finder.evaluation.metrics import METRICS
from schedule_finder.lmms_eval.demo_tasks import GROUP, write_tasks
from schedule_finder.lmms_eval.recording import agreement, read_records
from schedule_finder.lmms_eval.runs import Benchmark

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BACKBONE = ROOT / "schedule_finder" / "demo" / "backbone"
SCHEDULE = ROOT / "outputs" / "reference" / "4_schedule.json"
TASKS = (f"{GROUP}_open", f"{GROUP}_yes_no")
SMALLER = "4_schedule-smaller-images"
ITEMS, LAYERS, VISION = 8, 12, 64


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The local tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, ITEMS)
    return folder


def benchmark(tasks: Path, out: Path, schedule: object, *options: str) -> subprocess.CompletedProcess[str]:
    """Run both tasks through `adaptinfer-profile benchmark`, which runs lmms-eval in a process of its own."""
    return subprocess.run(
        [
            sys.executable, "-m", "schedule_finder", "benchmark", str(BACKBONE), "--tasks", ",".join(TASKS),
            "--schedule", str(schedule), "--baselines", "smaller-images", "--include-path", str(tasks), "--device", "cpu",
            "--model-args", "dtype=float32", "--out", str(out), *options,
        ],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip


def test_two_tasks_with_and_without_a_schedule(tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "benchmark"
    result = benchmark(tasks, out, SCHEDULE, "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    table = pd.read_csv(out / "benchmark.csv").set_index(["task", "metric", "method"])
    open_task, yes_no = TASKS
    assert table.score[open_task, "vqa_accuracy", "full"] > 0.8  # the demo backbone answers nearly everything
    assert set(table.loc[yes_no].index.get_level_values("metric")) == {
        "yes_no", "precision", "recall", "f1", "yes_share",
    }  # fmt: skip

    whole, pruned = (
        read_records(out / "full" / "record.json"),
        read_records(out / "4_schedule" / "record.json"),
    )
    schedule = Schedule.load(SCHEDULE)
    expected = VISION * sum(processed_ratios(schedule.stages, LAYERS)) / LAYERS
    for task, metric in zip(TASKS, ("vqa_accuracy", "yes_no"), strict=True):
        assert len(pruned[task].prompts) == len(pruned[task].answers) == ITEMS
        first, second = whole[task].means(), pruned[task].means()
        assert first["vision_tokens"] == first["computed"] == second["vision_tokens"] == VISION
        assert second["computed"] == pytest.approx(expected, rel=0.05)  # counts are rounded
        assert second["flops"] < 0.8 * first["flops"]
        assert second["kv_bytes"] < 0.8 * first["kv_bytes"]
        ours, full = table.loc[task, metric, "4_schedule"], table.loc[task, metric, "full"]
        assert ours.retention == pytest.approx(ours.score / full.score, rel=1e-4)
        assert ours.difference == pytest.approx(ours.score - full.score, abs=1e-5)
        assert ours.difference_low <= ours.difference <= ours.difference_high
        assert ours.agreement == pytest.approx(agreement(pruned[task], whole[task]), rel=1e-4)
        assert ours.processed == pytest.approx(second["computed"] / VISION, rel=1e-4)
        line = f"adaptinfer: {task}: "
        assert line in (out / "4_schedule" / "lmms_eval.log").read_text()
    assert table.hard_n[open_task, "vqa_accuracy", "4_schedule"] >= 0
    assert math.isnan(table.hard_n[open_task, "vqa_accuracy", "full"])
    assert not table.hard_score[open_task, "vqa_accuracy", SMALLER] >= RIGHT  # NaN where no item is hard
    assert "hard subset: " in result.stderr + result.stdout
    for suffix in ("pdf", "png", "csv"):
        assert (out / f"retention.{suffix}").stat().st_size > 0
    assert (out / "benchmark.tex").read_text().count(r"\\") == len(table) + 1
    assert len((out / "benchmark.md").read_text().splitlines()) == len(table) + 2

    written = {path: path.stat().st_mtime_ns for path in out.rglob("*_results.json")}
    assert len(written) == 3
    again = benchmark(tasks, out, SCHEDULE)  # finished methods are not run again
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*_results.json")} == written


def test_what_cannot_be_run_gives_no_scores(tasks: Path, tmp_path: Path) -> None:
    """A schedule for another backbone; nothing is scored as an empty answer."""
    arguments = {"base": "llava_hf", "pretrained": str(BACKBONE), "schedule": "fastv/llava-1.5-7b"}
    run = Benchmark(
        tmp_path, arguments, TASKS, ["--include_path", str(tasks), "--device", "cpu"], sys.executable
    )
    with pytest.raises(InputError, match="wrote no results for 'full'; it said: .*32"):
        run.run([])


def test_rouge_l_is_that_of_coco() -> None:
    from pycocoevalcap.rouge.rouge import Rouge

    rng = np.random.default_rng(0)
    words = np.array(["a", "red", "blue", "star", "ring", "left", "of", "the"])
    for _ in range(200):
        texts = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(rng.integers(2, 6))]
        expected = Rouge().calc_score(texts[:1], texts[1:])
        assert METRICS["rouge_l"].score(texts[0], texts[1:]) == pytest.approx(expected)


def test_llava_hf_loads_model_types_that_it_does_not_list(tmp_path: Path) -> None:
    from lmms_eval.models.simple import llava_hf
    from transformers import AutoModelForImageTextToText, VipLlavaConfig

    from schedule_finder.lmms_eval.model import _add_model_type, _wrapping

    VipLlavaConfig().save_pretrained(tmp_path)
    assert "vipllava" not in llava_hf.model_map
    listed = dict(llava_hf.model_map)
    _add_model_type(_wrapping("llava_hf"), {"pretrained": str(tmp_path)})
    assert llava_hf.model_map == listed | {"vipllava": AutoModelForImageTextToText}
    _add_model_type(_wrapping("llava_hf"), {"pretrained": str(BACKBONE)})
    assert llava_hf.model_map["llava"] is listed["llava"]


def test_a_base_whose_model_cannot_generate_is_refused() -> None:
    """`huggingface` of lmms-eval 0.7.3 takes the class without a language head of every model."""
    from schedule_finder.lmms_eval.model import _wrapping

    with pytest.raises(InputError, match="base=huggingface loads a LlavaModel, which cannot generate"):
        _wrapping("huggingface")(
            base="huggingface", baseline="full", pretrained=str(BACKBONE), device="cpu", device_map="cpu"
        )


def test_the_plug_in_is_registered() -> None:
    from lmms_eval.models import get_model, get_model_manifest

    path = get_model_manifest("adaptinfer").chat_class_path
    assert f"{get_model('adaptinfer').__module__}.{get_model('adaptinfer').__name__}" == path
