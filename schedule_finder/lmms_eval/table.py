"""One table of a benchmark: scores, retention and costs of every method on every task."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from schedule_finder.intervals import mean_interval
from schedule_finder.lmms_eval.recording import agreement, read_records
from schedule_finder.lmms_eval.runs import RECORD

COLUMNS = (
    "task", "metric", "method", "n", "score", "retention", "difference", "difference_low", "difference_high",
    "agreement", "processed", "flops", "kv_bytes", "prefill_ms",
)  # fmt: skip


def benchmark_table(folders: Sequence[Path]) -> pd.DataFrame:
    """One row per task, metric and method; ``folders`` as `Benchmark.run` returns them, the unpruned model's first.

    ``retention`` is the score as a share of the unpruned model's, NaN where that is 0. ``difference`` is the mean over
    documents of the score less the unpruned model's, with a paired 95 % bootstrap interval; NaN where the metric has
    no score per document. ``processed`` and the costs are shares of the unpruned model's.
    """
    first, *_ = folders
    full_scores, full_documents, full_records = (
        _scores(first),
        _documents(first),
        read_records(first / RECORD),
    )
    rows = []
    for folder in folders:
        documents, records = _documents(folder), read_records(folder / RECORD)
        for (task, metric), score in _scores(folder).items():
            whole = full_scores.get((task, metric), math.nan)
            row = {"task": task, "metric": metric, "method": folder.name, "score": score}
            row["retention"] = score / whole if whole else math.nan
            row |= _difference(documents.get((task, metric), {}), full_documents.get((task, metric), {}))
            if task in records and task in full_records:
                ours, theirs = records[task].means(), full_records[task].means()
                row["n"] = len(records[task].answers)
                row["agreement"] = agreement(records[task], full_records[task])
                row["processed"] = ours["computed"] / theirs["computed"] if theirs["computed"] else math.nan
                row |= {name: ours[name] / theirs[name] for name in ("flops", "kv_bytes", "prefill_ms")}
            rows.append(row)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.sort_values(["task", "metric"], kind="stable", ignore_index=True)


def write_table(table: pd.DataFrame, out: Path) -> list[Path]:
    """``benchmark.csv`` with everything, and ``.md`` and ``.tex`` with the columns of a paper."""
    shown = pd.DataFrame(
        {
            "task": table.task,
            "metric": table.metric,
            "method": table.method,
            "score": [percent(value) for value in table.score],
            "retention %": [percent(value) for value in table.retention],
            "tokens %": [percent(value) for value in table.processed],
            "prefill %": [percent(value) for value in table.prefill_ms],
        }
    )
    paths = [out / f"benchmark.{ending}" for ending in ("csv", "md", "tex")]
    paths[0].write_text(table.to_csv(index=False, float_format="%.6g"), encoding="utf-8")
    paths[1].write_text(_markdown(shown), encoding="utf-8")
    paths[2].write_text(_latex(shown), encoding="utf-8")
    return paths


def percent(value: float) -> str:
    """A share in percent; a score above 1 (MME, SEED-Bench in percent) is left as it is."""
    if math.isnan(value):
        return ""
    return f"{100 * value:.1f}" if abs(value) <= 2 else f"{value:.1f}"


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


def _scores(folder: Path) -> dict[tuple[str, str], float]:
    """The scores that lmms-eval wrote, by task and metric; standard errors and texts are left out."""
    path = max(folder.rglob("*_results.json"))
    found = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {
        (task, key.partition(",")[0]): float(value)
        for task, row in found.items()
        for key, value in row.items()
        if "," in key and "stderr" not in key and isinstance(value, (int, float))
    }


def _documents(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """The score of each document, by task and metric, where the metric is a number or has a ``score``."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for path in folder.rglob("*_samples_*.jsonl"):
        task = path.stem.partition("_samples_")[2]
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            for metric, value in sample.items():
                number = value.get("score") if isinstance(value, dict) else value
                if metric != "doc_id" and isinstance(number, (int, float)):
                    found.setdefault((task, metric), {})[str(sample["doc_id"])] = float(number)
    return found


def _difference(ours: dict[str, float], full: dict[str, float]) -> dict[str, Any]:
    """Mean difference over the documents of both, with a paired interval."""
    pairs = np.array([ours[name] - full[name] for name in ours if name in full])
    if not len(pairs):
        return {}
    low, high = mean_interval(pairs)
    return {"difference": float(pairs.mean()), "difference_low": low, "difference_high": high}
