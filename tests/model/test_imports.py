"""A served model needs none of the tools that find schedules."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.support.hidden_packages import FINDER_ONLY, run_with_hidden

ROOT = Path(__file__).parents[2]
RUNTIME_FILES = sorted((ROOT / "pruning_runtime").rglob("*.py"))

SERVE = """
import importlib
for name in sorted(HIDDEN):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} was not hidden: this check proves nothing")

import torch
from pruning_runtime import Schedule, Stage, pruned
from pruning_runtime.schedule import BackboneIdentity, ScorerChoice
from tests.support.tiny_models import FAMILIES, LAYERS

assert Schedule.preset("adaptinfer/llava-1.5-7b-64").stages[0].keep_tokens == 133
torch.set_num_threads(1)
schedule = Schedule(
    backbone=BackboneIdentity(name="tiny", model_type="llava", num_layers=LAYERS),
    stages=(Stage(layer=1, keep_ratio=0.25),),
    scorer=ScorerChoice(name="text_guided"),
)
model = FAMILIES["llava"].build()
with pruned(model, schedule) as record, torch.no_grad():
    model(**FAMILIES["llava"].batch((1,)))
print(record.vision_tokens_per_layer)
print(sorted(HIDDEN & {name.partition(".")[0] for name in sys.modules}))
"""


def test_a_model_is_served_without_the_finder_s_packages() -> None:
    done = run_with_hidden(SERVE, FINDER_ONLY)
    assert done.returncode == 0, done.stderr
    tokens, imported = done.stdout.splitlines()[-2:]
    assert tokens == "[[16], [16], [4], [4], [4], [4]]"
    assert imported == "[]"


def test_gpus_are_measured_without_the_finder_s_packages() -> None:
    """A machine with a GPU may have torch and transformers only."""
    code = "HIDDEN.discard('schedule_finder')\nimport scripts.bench_gpu\nprint(len(scripts.bench_gpu.PLAN))"
    done = run_with_hidden(code, FINDER_ONLY)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_the_check_above_can_fail() -> None:
    """Hiding a package that the runtime does need makes its import fail."""
    done = run_with_hidden("from pruning_runtime import pruned", ("torch",))
    assert done.returncode == 1
    assert "No module named 'torch'" in done.stderr


def imported_packages(source: str) -> set[str]:
    """Top-level packages that ``source`` imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module if node.level == 0 else "pruning_runtime")
    return {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("path", RUNTIME_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_runtime_imports_only_what_it_declares(path: Path) -> None:
    allowed = {
        # The plug-in for vLLM is imported by vLLM only.
        *(["vllm"] if path.parent.name == "vllm" else []),
        "torch",
        "transformers",
        "safetensors",
        "pydantic",
        "pruning_runtime",
        *sys.stdlib_module_names,
    }
    assert imported_packages(path.read_text(encoding="utf-8")) <= allowed


def test_imports_inside_functions_are_seen() -> None:
    source = "def f():\n    from schedule_finder.pipeline import detect_step\n    import pandas as pd\n"
    assert imported_packages(source) == {"schedule_finder", "pandas"}
    assert len(RUNTIME_FILES) > 10
