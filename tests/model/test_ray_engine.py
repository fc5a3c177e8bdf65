"""Ray on a cluster of this machine's processors: the same rows as in one process, whoever dies."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from schedule_finder import pipeline
from schedule_finder.cli.commands import app
from schedule_finder.errors import InputError
from schedule_finder.models.loading import load_backbone
from schedule_finder.profiling.engines.base import BatchLimits
from schedule_finder.profiling.engines.local import LocalEngine
from schedule_finder.profiling.engines.ray_engine import RayEngine, WorkerSettings
from schedule_finder.run.folder import Run
from schedule_finder.samples import open_data
from tests.support.stored_profiles import assert_equal, ids_of
from tests.support.tiny_folder import write_jsonl, write_qwen2_vl_folder

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

LIMITS = BatchLimits(samples=8, tokens=200)
SAMPLES = 300
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two processors, whatever this machine has; workers get the tests' torchvision."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20,
        runtime_env={"worker_process_setup_hook": "tests.support.ray_worker.set_up", "env_vars": {"PYTHONPATH": str(ROOT)}},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[WorkerSettings, dict[str, Any], Run]:
    """A checkpoint, data with one bad image, and what the local engine makes of them."""
    folder = tmp_path_factory.mktemp("made")
    checkpoint = str(write_qwen2_vl_folder(folder / "qwen"))
    data = write_jsonl(folder / "data", SAMPLES + 2, sizes=True)
    (data.parent / "images" / "7.png").write_text("not an image")
    options = {"samples": SAMPLES, "eval_samples": 2, "seed": 0, "dataset": str(data), "columns": {}}
    load = functools.partial(load_backbone, checkpoint, device="cpu")
    settings = WorkerSettings(load, functools.partial(open_data, str(data)), LIMITS, gpus=0)
    run = Run.begin(folder / "local", "test", options)
    pipeline.profile_step(
        run, LocalEngine(load(), settings.open_data(), LIMITS), settings.open_data(), lambda *_: None,
        report=pytest.fail,
    )  # fmt: skip
    return settings, options, run


def workers() -> set[int]:
    """Processes that are profiling now."""
    ours = psutil.Process().children(recursive=True)
    return {process.pid for process in ours if "_RayWorker.profile" in " ".join(process.cmdline())}


def test_a_worker_that_is_killed_is_replaced_and_its_samples_done_again(
    cluster: None, made: tuple[WorkerSettings, dict[str, Any], Run], tmp_path: Path
) -> None:
    settings, options, expected = made
    run = Run.begin(tmp_path, "test", options)
    killed: list[int] = []

    def kill_one(done: int, total: int) -> None:
        if done >= 64 and not killed and (busy := workers()):
            killed.append(busy.pop())
            os.kill(killed[0], signal.SIGKILL)

    with RayEngine(settings, workers=2) as engine:
        counts = pipeline.profile_step(run, engine, settings.open_data(), kill_one, report=pytest.fail)
    assert killed
    assert counts == {"done": len(ids_of(expected)) - 1, "skipped": 1}
    stored = run.profile.ids()
    assert len(stored) == len(set(stored))
    assert_equal(run.profile.read(), expected.profile.read())
    assert run.samples.read_text() == expected.samples.read_text()
    assert run.profile.meta() == expected.profile.meta()


def test_what_is_wrong_is_said_before_anything_is_written(
    cluster: None, made: tuple[WorkerSettings, dict[str, Any], Run], tmp_path: Path
) -> None:
    settings, _, _ = made
    with pytest.raises(InputError, match="each needs 1 CPU, and the Ray cluster has 2"):
        RayEngine(settings, workers=3)
    nowhere = functools.partial(load_backbone, str(tmp_path / "none"), device="cpu")
    with pytest.raises(InputError, match=r"no config\.json") as refused:
        RayEngine(WorkerSettings(nowhere, settings.open_data, LIMITS, gpus=0))
    assert "\n" not in str(refused.value)


def test_the_command(cluster: None, made: tuple[WorkerSettings, dict[str, Any], Run], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    settings, options, expected = made
    checkpoint = settings.load.args[0]  # type: ignore[attr-defined]
    result = CliRunner().invoke(
        app,
        ["profile", checkpoint, "--dataset", options["dataset"], "--samples", str(SAMPLES), "--eval-samples", "2",
         "--engine", "ray", "--workers", "2", "--batch-size", "8", "--batch-tokens", "200", "--device", "cpu",
         "--out", str(tmp_path / "run"), "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "2 Ray worker(s) of 1 CPU each" in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])["done"] == len(ids_of(expected)) - 1
    assert_equal(Run(tmp_path / "run").profile.read(), expected.profile.read())


def test_without_ray(
    monkeypatch: pytest.MonkeyPatch, made: tuple[WorkerSettings, dict[str, Any], Run]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'adaptinfer\[ray\]'"):
        RayEngine(made[0])
