"""One table of a benchmark: scores, retention and costs of every method on every task."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from schedule_finder.evaluation.hard_subset import FEWEST, HARD_COLUMNS, hard_items, on_hard_items
from schedule_finder.intervals import mean_interval, ratio_interval
from schedule_finder.lmms_eval.arguments import SMALLER_IMAGES
from schedule_finder.lmms_eval.recording import TaskRecord, agreement, read_record
from schedule_finder.lmms_eval.runs import RECORD

COLUMNS = (
    "task", "metric", "method", "baseline", "n", "score", "retention", "retention_low", "retention_high",
    "difference", "difference_low", "difference_high", "agreement", "processed", "flops", "kv_bytes", "prefill_ms",
    *HARD_COLUMNS, "main",
)  # fmt: skip
_Metric = tuple[str, str]
"""A task and one of its metrics."""


@dataclass(frozen=True)
class _Results:
    """One method: its scores in lmms-eval's order, the scores of its items, its costs, and what was run."""

    name: str
    scores: dict[_Metric, float]
    items: dict[_Metric, dict[str, float]]
    tasks: dict[str, TaskRecord]
    facts: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> _Results:
        return cls(folder.name, _scores(folder), _items(folder), *read_record(folder / RECORD))


def benchmark_table(folders: Sequence[Path]) -> pd.DataFrame:
    """One row per task, metric and method; ``folders`` as `Benchmark.run` returns them, the unpruned model's first.

    ``retention`` is the score as a share of the unpruned model's, NaN where that is 0. ``difference`` is the mean over
    items of the score less the unpruned model's. Both have paired 95 % bootstrap intervals; these are NaN where the
    metric has no score per item. ``baseline`` is ``full``, empty for a schedule itself, else the baseline's name.
    ``processed`` and the costs are shares of the unpruned model's. `HARD_COLUMNS` are on the hard subset of the method's
    schedule, NaN where the baseline with down-sampled images was not run.

    ``main`` marks one metric of each task: the first that scores items, else the first.
    """
    methods = [_Results.read(folder) for folder in folders]
    full = methods[0]
    smaller = {one.facts["schedule"]: one for one in methods if one.facts["baseline"] == SMALLER_IMAGES}
    rows = []
    for key, whole in full.scores.items():
        task, metric = key
        for one in methods:
            if key not in one.scores:
                continue
            score = one.scores[key]
            row = {"task": task, "metric": metric, "method": one.name, "score": score}
            row["baseline"] = one.facts["baseline"] or ""
            row |= {"retention": score / whole if whole else math.nan, "main": key in _main(full)}
            row |= _difference(one.items.get(key, {}), full.items.get(key, {}))
            row |= _costs(one.tasks.get(task), full.tasks.get(task))
            if one.facts["schedule"] in smaller:
                small = smaller[one.facts["schedule"]].items.get(key, {})
                row |= _on_hard(one.items.get(key, {}), full.items.get(key, {}), small)
            rows.append(row)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.sort_values("task", kind="stable", ignore_index=True)


def averages(table: pd.DataFrame) -> pd.DataFrame:
    """For each method: mean retention over the tasks' main metrics, and the score on the hard items of all tasks."""
    main = table[table.main & table.retention.notna()]
    rows = []
    for name in main.method.unique():
        own = main[main.method == name]
        hard = own[own.hard_n > 0]
        rows.append(
            {
                "method": name,
                "tasks": len(own),
                "retention": own.retention.mean(),
                "processed": own.processed.mean(),
                "hard_n": own.hard_n.sum() if own.hard_n.notna().any() else math.nan,
                "hard_score": (hard.hard_score * hard.hard_n).sum() / hard.hard_n.sum()
                if len(hard)
                else math.nan,
            }
        )
    return pd.DataFrame(rows)


def write_table(table: pd.DataFrame, out: Path) -> list[Path]:
    """``benchmark.csv`` with everything, and ``.md`` and ``.tex`` with the columns of a paper."""
    shown = pd.DataFrame(
        {
            "task": table.task,
            "metric": table.metric,
            "method": table.method,
            "score": [score_text(value) for value in table.score],
            "retention %": [
                with_interval(*one)
                for one in zip(table.retention, table.retention_low, table.retention_high, strict=True)
            ],
            "tokens %": [percent(value) for value in table.processed],
            "prefill %": [percent(value) for value in table.prefill_ms],
            "hard items": [few(count) for count in table.hard_n],
            "score on them": [
                with_interval(*one)
                for one in zip(table.hard_score, table.hard_low, table.hard_high, strict=True)
            ],
        }
    )
    paths = [out / f"benchmark.{ending}" for ending in ("csv", "md", "tex")]
    paths[0].write_text(table.to_csv(index=False, float_format="%.6g"), encoding="utf-8")
    paths[1].write_text(_markdown(shown), encoding="utf-8")
    paths[2].write_text(_latex(shown), encoding="utf-8")
    return paths


def percent(share: float) -> str:
    """A share in percent, empty where it is missing."""
    return "" if math.isnan(share) else f"{100 * share:.1f}"


def score_text(value: float) -> str:
    """A score in percent; one above 1 (MME, SEED-Bench in percent) is left as it is."""
    return percent(value) if math.isnan(value) or abs(value) <= 1 else f"{value:.1f}"


def with_interval(share: float, low: float, high: float) -> str:
    """A share in percent with its interval, where there is one."""
    interval = f" ({percent(low)}-{percent(high)})" if low < high else ""
    return "" if math.isnan(share) else percent(share) + interval


def few(count: float) -> str:
    """The number of hard items, in brackets where it is too small for a conclusion."""
    if math.isnan(count):
        return ""
    return f"{count:.0f}" if count >= FEWEST else f"({count:.0f})"


def _markdown(table: pd.DataFrame) -> str:
    lines = [list(table.columns), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _latex(table: pd.DataFrame) -> str:
    """A ``tabular`` with rules of booktabs."""
    escaped = [
        " & ".join(str(cell).replace("_", r"\_").replace("%", r"\%") for cell in line) + r" \\"
        for line in (list(table.columns), *table.to_numpy().tolist())
    ]
    head, *body = escaped
    lines = [rf"\begin{{tabular}}{{lll{'r' * (table.shape[1] - 3)}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _scores(folder: Path) -> dict[_Metric, float]:
    """The scores that lmms-eval wrote, by task and metric; standard errors and texts are left out."""
    path = max(folder.rglob("*_results.json"))
    found = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {
        (task, key.partition(",")[0]): float(value)
        for task, row in found.items()
        for key, value in row.items()
        if "," in key and "stderr" not in key and isinstance(value, (int, float))
    }


def _items(folder: Path) -> dict[_Metric, dict[str, float]]:
    """The score of each item, by task and metric, where the metric is a number or has a ``score``."""
    found: dict[_Metric, dict[str, float]] = {}
    for path in folder.rglob("*_samples_*.jsonl"):
        task = path.stem.partition("_samples_")[2]
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            for metric, value in sample.items():
                number = value.get("score") if isinstance(value, dict) else value
                if metric != "doc_id" and isinstance(number, (int, float)):
                    found.setdefault((task, metric), {})[str(sample["doc_id"])] = float(number)
    return found


def _main(full: _Results) -> set[_Metric]:
    """One metric of each task: the first that scores items, else the first."""
    found: dict[str, _Metric] = {}
    for key in [*(key for key in full.scores if key in full.items), *full.scores]:
        found.setdefault(key[0], key)
    return set(found.values())


def _costs(ours: TaskRecord | None, full: TaskRecord | None) -> dict[str, Any]:
    """Items, equal answers, and costs as shares of the unpruned model's."""
    if ours is None or full is None:
        return {}
    means, whole = ours.means(), full.means()
    shares = {name: means[name] / whole[name] for name in ("flops", "kv_bytes", "prefill_ms")}
    processed = means["computed"] / whole["computed"] if whole["computed"] else math.nan
    return {"n": len(ours.answers), "agreement": agreement(ours, full), "processed": processed, **shares}


def _on_hard(ours: dict[str, float], full: dict[str, float], smaller: dict[str, float]) -> dict[str, Any]:
    """`HARD_COLUMNS`; empty where the metric has no score per item."""
    known = [name for name in full if name in ours and name in smaller]
    if not known:
        return {}
    scores = np.array([[each[name] for name in known] for each in (ours, full, smaller)])
    hard = hard_items(scores[1], scores[2])
    return on_hard_items(scores[:1, hard], scores[1, hard])


def _difference(ours: dict[str, float], full: dict[str, float]) -> dict[str, Any]:
    """Mean difference over the items of both, and the intervals of retention and difference."""
    known = [name for name in ours if name in full]
    if not known:
        return {}
    scores = np.array([[each[name] for name in known] for each in (ours, full)])
    difference = scores[0] - scores[1]
    low, high = mean_interval(difference)
    kept = ratio_interval(*scores)
    return {
        "difference": float(difference.mean()),
        "difference_low": low,
        "difference_high": high,
        "retention_low": kept[0],
        "retention_high": kept[1],
    }
