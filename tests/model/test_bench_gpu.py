"""The script for GPUs: its goals, and that a failing baseline does not affect the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from schedule_finder.models.shapes import shapes
from scripts.bench_gpu import GOAL_BACKBONE, PLAN, goals
from scripts.bench_process import NO_TIME, SPARE_SECONDS, BenchProcess, Job
from tests.support import bench_worker

ROOT = Path(__file__).parents[2]
NEEDED = ("unpruned", "schedule")


# ---- goals


def measured(batch: int, **decoder_ms: float) -> dict[str, Any]:
    """A bench in which each token after the first takes a millisecond, on every path."""
    names = {
        "unpruned": "unpruned",
        "ours": "schedule",
        "full_fast": "unpruned, fast",
        "ours_fast": "schedule, fast",
    }
    results = []
    for key, ms in decoder_ms.items():
        fast = key.endswith("fast")
        full = decoder_ms.get("full_fast" if fast else "unpruned")
        results.append(
            {
                "batch": batch,
                "baseline": names[key],
                "decoder_ms": {"median": ms},
                "same_path_ratio": {"median": ms / full} if full else None,
                "total_ms": {"16": {"median": ms + 15}},
                "prefill": {"scoring": None if fast else 1.0, "dropping": None if fast else 0.5},
                "roofline_ms": 20.0,
            }
        )
    return {"backbone": {"name": GOAL_BACKBONE}, "lengths": [1, 16], "results": results}


def test_goals_are_judged_on_the_fast_path_where_it_was_measured() -> None:
    found = goals([measured(8, unpruned=100, ours=45, full_fast=60, ours_fast=24)], GOAL_BACKBONE)
    by_name = {(goal["path"], goal["what"].partition(",")[0]): goal for goal in found}
    saved, total = "decoder prefill saved", "total with 16 new tokens"
    roofline, pruning = "pruned prefill", "scoring and dropping"
    assert {key: (goal["value"], goal["met"], goal["judged"]) for key, goal in by_name.items()} == {
        ("stock", saved): (pytest.approx(0.55), False, False),
        ("stock", total): (pytest.approx(60 / 115), True, False),
        ("stock", roofline): (pytest.approx(2.25), False, False),
        ("stock", pruning): (pytest.approx(1.5 / 45), False, True),
        ("fast", saved): (pytest.approx(0.6), False, True),
        ("fast", total): (pytest.approx(39 / 75), True, True),
        ("fast", roofline): (pytest.approx(1.2), True, True),
    }


@pytest.mark.parametrize("lost", ["full_fast", "ours_fast"])
def test_without_its_yardstick_the_stock_path_is_judged(lost: str) -> None:
    times = {"unpruned": 100.0, "ours": 30.0, "full_fast": 60.0, "ours_fast": 24.0}
    del times[lost]
    found = goals([measured(1, **times)], GOAL_BACKBONE)
    assert {goal["path"] for goal in found} == {"stock"}
    assert all(goal["judged"] for goal in found)
    assert found[0]["value"] == pytest.approx(0.7)
    assert found[0]["met"]
    assert goals([measured(1, **times)], "shape:another") == []


def test_the_plan_names_shapes_and_fits_into_its_time() -> None:
    assert {job.backbone.removeprefix("shape:") for job in PLAN} == set(shapes()) - {"llava-tiny"}
    assert [job.batch for job in PLAN if job.backbone == GOAL_BACKBONE] == [1, 8, 32]
    assert sum(job.seconds for job in PLAN) < 400


# ---- processes that fail


@pytest.mark.slow
def test_a_baseline_that_ends_its_process_affects_no_other(tmp_path: Path) -> None:
    runner = BenchProcess(
        bench_worker.works, (str(tmp_path),), NEEDED, until=time.monotonic() + 3600, timeout=30
    )
    plan = [
        Job(name, 1, (1,), 1.0, ("given",)) for name in ("exits", "fine", "killed", "raises", "hangs", "x")
    ]
    found = list(runner.documents(plan))
    assert [(one["name"], one["process"], one["without"]) for one in found] == [
        ("exits", 1, ("given", "no-scoring bound")),
        ("fine", 1, ("given", "no-scoring bound")),
        ("killed", 2, ("given", "no-scoring bound", "before decoder")),
        ("hangs", 4, ("given", "no-scoring bound", "before decoder", "schedule, fast")),
        ("x", 4, ("given", "no-scoring bound", "before decoder", "schedule, fast")),
    ]
    assert [(one["backbone"], one.get("baseline"), one["reason"]) for one in runner.failed] == [
        ("exits", "no-scoring bound", "the process ended with code 7; left out from here on"),
        ("killed", "before decoder", "the process ended with code -9; left out from here on"),
        ("raises", None, "InputError: no"),
        ("hangs", "schedule, fast", "no message for 30 s; left out from here on"),
        ("x", "x", "in the bench"),
    ]


@pytest.mark.slow
def test_all_is_over_when_time_is_up(tmp_path: Path) -> None:
    begun, last = time.monotonic(), SPARE_SECONDS + 2
    runner = BenchProcess(bench_worker.works, (str(tmp_path),), NEEDED, until=begun + last, timeout=100)
    assert list(runner.documents([Job("hangs", 1, (1,), 0.0), Job("fine", 1, (1,), 0.0)])) == []
    assert time.monotonic() - begun >= last
    assert [one["reason"] for one in runner.failed] == [NO_TIME, NO_TIME]
    assert not any("baseline" in one for one in runner.failed)


@pytest.mark.slow
def test_a_dry_run(tmp_path: Path) -> None:
    """Everything that a GPU would run, on a CPU; one backbone cannot be built."""
    out = tmp_path / "gpu.json"
    # Every process starts with it: a torchvision that imports.
    (tmp_path / "sitecustomize.py").write_text("import tests.conftest")
    path = os.pathsep.join(map(str, (tmp_path, ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench_gpu", "--device", "cpu", "--fast", "--backbones", "shape:llava-tiny",
         "shape:nowhere", "--batches", "1", "2", "--lengths", "1", "2", "--out", str(out)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    document = json.loads(out.read_text())
    assert [[len(bench["results"]), bench["failed"]] for bench in document["benches"]] == [[8, []], [8, []]]
    assert {(goal["batch"], goal["path"]) for goal in document["goals"]} == {
        (batch, path) for batch in (1, 2) for path in ("stock", "fast")
    }
    assert [(one["backbone"], one["batch"]) for one in document["failed"]] == [
        ("shape:nowhere", 1),
        ("shape:nowhere", 2),
    ]
    assert all("no such shape" in one["reason"] for one in document["failed"])
    assert "2 benches, 2 failures" in done.stdout
