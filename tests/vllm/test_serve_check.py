"""`adaptinfer-profile serve-check` with real servers on the demo backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("vllm")

from pruning_runtime import Schedule, Stage
from pruning_runtime.schedule import BackboneIdentity, ScorerChoice
from schedule_finder.cli.commands import app

pytestmark = pytest.mark.slow


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments), "--json"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo with a profile and held-out samples."""
    out = tmp_path_factory.mktemp("check") / "run"
    result = run("profile", "demo", "--samples", 8, "--eval-samples", 24, "--device", "cpu", "--out", out)
    assert result.exit_code == 0, result.output + result.stderr
    return out


def saved(path: Path, layer: int, ratio: float) -> Path:
    Schedule(
        backbone=BackboneIdentity(name="demo", model_type="llava", num_layers=12),
        stages=(Stage(layer=layer, keep_ratio=ratio),),
        scorer=ScorerChoice(name="divprune"),
    ).save(path)
    return path


def test_both_servers_are_measured_side_by_side(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    schedule = saved(folder / "quarter.json", -1, 0.25)
    options = ["--vllm-arg=--dtype=float32", "--vllm-arg=--max-model-len=256", "--vllm-arg=--enforce-eager"]
    result = run("serve-check", folder, "--schedule", schedule, "--concurrency", "1,4", *options)
    assert result.exit_code == 0, result.output + result.stderr
    document = json.loads(result.stdout.strip().splitlines()[-1])
    assert document["device"] == "cpu"
    assert "say nothing about a GPU" in result.stderr
    assert [(row["method"], row["concurrency"]) for row in document["rows"]] == [
        ("full", 1), ("full", 4), ("quarter", 1), ("quarter", 4),
    ]  # fmt: skip
    first, *_, last = document["rows"]
    assert first["score"] > 0.9
    assert first["prompt_tokens"] - last["prompt_tokens"] == 48
    assert all(row["answers_per_second"] > 0 and row["first_token_ms"] > 0 for row in document["rows"])
    assert len(document["verdicts"]) == 3
    written = json.loads((folder / "serve_check" / "quarter" / "serve_check.json").read_text())
    assert written["rows"] == document["rows"]


def test_a_schedule_that_vllm_cannot_run_is_refused_before_a_server_starts(folder: Path) -> None:
    result = run("serve-check", folder, "--schedule", saved(folder / "inside.json", 3, 0.25))
    assert result.exit_code == 2
    assert "a stage at layer 3; find one with" in " ".join(result.stderr.split())
