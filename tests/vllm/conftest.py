"""vLLM's environment, and engines that several tests read; vLLM reads its settings when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""For a CPU; the engine runs in the process that asks."""
for variable, value in ENVIRONMENT.items():
    os.environ.setdefault(variable, value)

Turns = list[list[dict[str, Any]]]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint folders by family."""
    from tests.support.vllm_folders import (
        write_demo_folder,
        write_llava_next_folder,
        write_qwen3_folder,
        write_qwen_folder,
    )

    base = tmp_path_factory.mktemp("checkpoints")
    return {
        "llava": write_demo_folder(base / "llava"),
        "llava_next": write_llava_next_folder(base / "llava_next"),
        "qwen": write_qwen_folder(base / "qwen"),
        "qwen3": write_qwen3_folder(base / "qwen3"),
    }


@pytest.fixture(scope="session")
def answers(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Turns]:
    """Answers of an engine in a process of its own: ``answers(family, plugin=..., setting=...)``, once each."""
    base = tmp_path_factory.mktemp("answers")

    @cache
    def run(family: str, *, plugin: bool = True, setting: bool = True) -> Turns:
        # Small steps split images between two of them; the second turn finds everything in the caches.
        engine = {
            "max_model_len": 256 if family == "llava" else 1024,
            "max_num_batched_tokens": 64,
            "block_size": 32,
            "enable_chunked_prefill": True,
            "enable_prefix_caching": True,
            "hf_overrides": {"adaptinfer": {"keep_ratio": 1.0}} if setting else {},
        }
        job = {
            "folder": str(folders[family]),
            "family": family,
            "engine": engine,
            "settings": setting,
            "uuids": setting,
            "turns": 2 if setting else 1,
        }
        name = f"{family}-{plugin}-{setting}"
        (base / f"{name}-job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.support.vllm_answers",
                base / f"{name}-job.json",
                base / f"{name}.json",
            ],
            cwd=ROOT,
            env=os.environ | ({} if plugin else {"VLLM_PLUGINS": ""}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        turns: Turns = json.loads((base / f"{name}.json").read_text())
        return turns

    return run
