"""What the command line offers by name, without importing torch.

Names whose registry imports light modules only are read from it. The others are listed here; a test compares each
list with its registry.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import get_args

from pruning_runtime.schedule import BudgetKind, DroppedTokens
from pruning_runtime.scorers import SCORERS
from schedule_finder.evaluation.metrics import METRICS
from schedule_finder.measuring.token_policy import CONTROLS

AUTO = "auto"
"""Samples, scorer and dropped tokens: chosen by measurement. `schedule_finder.search.AUTO`."""

MOST_ROWS = 10_000_000
"""Most samples that can be asked for: all of them are listed before the first is loaded."""
MOST_THREADS = 1024
"""Most CPU threads that can be asked for; torch takes any number, and fails with one that is too large."""
SOLVER_NAMES = ("sensitivity", "retained", "paper", "pyramid", "fitprune", "dop", "grid")
"""`schedule_finder.solvers.SOLVERS`; the first is the default."""
MEASURING_SOLVERS = ("sensitivity", "dop", "grid")
"""Those that measure on the model."""
DETECTOR_NAMES = ("attention_shift", "token_curve")
"""`schedule_finder.change_points.DETECTORS`; the first is the default."""
ENGINE_NAMES = ("local", "ray")
BASELINE_NAMES = (
    *sorted(SCORERS, key=lambda name: name not in CONTROLS),
    "not-merged",
    "paper",
    "pyramid",
    "random-layers",
    "smaller-images",
)
"""`schedule_finder.evaluation.methods.BASELINES`."""
METRIC_NAMES = tuple(METRICS)
"""`schedule_finder.evaluation.metrics.METRICS`."""
STYLE_NAMES = ("screen", "paper")
"""`schedule_finder.figures.style.STYLES`; the first is the default."""
DTYPE_NAMES = (AUTO, "float32", "bfloat16", "float16")
"""`schedule_finder.models.loading.DTYPES` and `AUTO`."""

SERVING_ENGINES = ("vllm",)
"""`schedule_finder.served_search.ENGINE`."""

SCORER_NAMES = tuple(SCORERS)
"""`pruning_runtime.scorers.SCORERS`."""
BUDGET_KINDS: tuple[BudgetKind, ...] = get_args(BudgetKind)
DROPPED_TOKENS: tuple[DroppedTokens, ...] = get_args(DroppedTokens)

NUM_DEFAULT_BASELINES = 3
"""`schedule_finder.evaluation.methods.NUM_DEFAULT`."""
RANDOM_DRAWS = 3
"""`schedule_finder.evaluation.methods.RANDOM_DRAWS`, of each of `DRAWN_BASELINES`."""
DRAWN_BASELINES = ("random", "random-layers")
RESERVED_NAMES = ("full", "schedule", *(name.replace("-", " ") for name in BASELINE_NAMES), *BASELINE_NAMES)
"""Methods of an evaluation; no schedule can be called so."""

OLD_NAMES = {"distribution_shift": "attention_shift", "none": "discard", "merged": "merge"}
"""Names of the previous release, accepted for one more."""


def data_presets() -> tuple[str, ...]:
    """Names of the data sets in ``samples/presets.json``."""
    text = (resources.files("schedule_finder") / "samples" / "presets.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["presets"])


def listed(names: tuple[str, ...], last: str = "or") -> str:
    """``a, b or c``."""
    return f"{', '.join(names[:-1])} {last} {names[-1]}" if len(names) > 1 else names[0]
