"""The table and the figure of `benchmark`, from files as lmms-eval and the plug-in write them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from schedule_finder.figures.task_retention import MEAN, task_retention, write_task_retention
from schedule_finder.lmms_eval.recording import PromptCosts, TaskRecord, write_records
from schedule_finder.lmms_eval.table import (
    averages,
    benchmark_table,
    few,
    percent,
    score_text,
    with_interval,
    write_table,
)

FULL, OWN, RANDOM, SMALLER = "full", "mine", "mine-random", "mine-smaller-images"
Scores = Mapping[str, Sequence[float]]


def write_method(
    out: Path, name: str, tasks: Mapping[str, Scores], schedule: str | None = "mine.json"
) -> Path:
    """A method's folder; ``tasks`` has the scores of the items for each task and metric."""
    folder = out / name
    folder.mkdir(parents=True)
    results = {
        task: {f"{metric},none": float(np.mean(scores)) for metric, scores in metrics.items()}
        | {"yes_share,none": 0.5, "alias": task, "acc_stderr,none": 0.1}
        for task, metrics in tasks.items()
    }
    (folder / "1_results.json").write_text(json.dumps({"results": results}))
    records = {}
    for task, metrics in tasks.items():
        count = len(next(iter(metrics.values())))
        lines = [
            {"doc_id": item, "yes_share": {"answer": "yes"}}
            | {name: scores[item] for name, scores in metrics.items()}
            for item in range(count)
        ]
        path = folder / f"1_samples_{task}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        cost = PromptCosts(64, 10, 64 if name == FULL else 16, 4e9 if name == FULL else 1e9, 2.0**20, 5.0)
        answers = {
            str(item): str(scores[item]) for scores in [next(iter(metrics.values()))] for item in range(count)
        }
        records[task] = TaskRecord([cost] * count, answers)
    baseline = FULL if name == FULL else name.removeprefix(OWN).removeprefix("-") or None
    write_records(folder / "record.json", records, {"schedule": schedule, "baseline": baseline})
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two tasks of twenty items; of ``pope`` the smaller image loses twelve that the full model has, of ``docs`` two."""
    one, none = [1.0], [0.0]
    found = {
        FULL: {"pope": {"acc": one * 16 + none * 4}, "docs": {"anls": [0.8] * 20}},
        OWN: {"pope": {"acc": one * 13 + none * 7}, "docs": {"anls": [0.8] * 19 + [0.2]}},
        RANDOM: {"pope": {"acc": one * 4 + none * 3 + one * 3 + none * 10}, "docs": {"anls": [0.4] * 20}},
        SMALLER: {"pope": {"acc": one * 4 + none * 16}, "docs": {"anls": [0.8] * 18 + [0.4, 0.0]}},
    }
    return [
        write_method(tmp_path, name, tasks, None if name == FULL else "mine.json")
        for name, tasks in found.items()
    ]


def test_scores_retention_and_the_hard_subset(folders: list[Path]) -> None:
    table = benchmark_table(folders).set_index(["task", "metric", "method"])
    assert len(table) == 2 * 2 * 4  # two metrics, four methods
    row = table.loc["pope", "acc", OWN]
    assert (row.score, row.retention, row.n, row.processed) == (0.65, 0.65 / 0.8, 20, 0.25)
    assert row.retention_low < row.retention < row.retention_high <= 1
    assert row.difference == pytest.approx(-0.15)
    # Items 4 to 15 are hard; the schedule has 9 of those 12, random tokens have 3.
    assert (row.hard_n, row.hard_score, row.hard_retention) == (12, 0.75, 0.75)
    assert row.hard_low == pytest.approx(0.4677, abs=1e-4)  # Wilson's interval
    assert row.hard_high == pytest.approx(0.9111, abs=1e-4)
    assert table.hard_score["pope", "acc", RANDOM] == 0.25
    assert table.hard_score["pope", "acc", SMALLER] == 0  # by construction
    assert math.isnan(table.hard_n["pope", "acc", FULL])
    # An item counts as answered from half of the score on.
    row = table.loc["docs", "anls", OWN]
    assert (row.hard_n, row.hard_score, row.hard_retention) == (2, 0.5, pytest.approx(0.625))
    assert table.loc[("pope", "yes_share")][["difference", "hard_n", "retention_low"]].isna().all(axis=None)
    main = table[table.main].index.droplevel("method").unique()
    assert set(main) == {("pope", "acc"), ("docs", "anls")}


def test_without_smaller_images_there_is_no_hard_subset(folders: list[Path]) -> None:
    table = benchmark_table(folders[:3])
    assert table.filter(like="hard").isna().all(axis=None)
    assert averages(table).filter(like="hard").isna().all(axis=None)


def test_the_hard_subset_is_that_of_the_same_schedule(folders: list[Path]) -> None:
    scores = [1.0] * 16 + [0.0] * 4
    other = write_method(folders[0].parent, "other", {"pope": {"acc": scores}}, "other.json")
    table = benchmark_table([*folders, other]).set_index("method")
    assert table.loc[["other"], "hard_n"].isna().all()
    assert table.loc[[OWN], "hard_n"].notna().any()


def test_means_over_the_tasks(folders: list[Path]) -> None:
    means = averages(benchmark_table(folders)).set_index("method")
    assert means.retention[OWN] == pytest.approx((0.65 / 0.8 + 0.77 / 0.8) / 2)
    assert means.hard_n[OWN] == 14
    assert means.hard_score[OWN] == pytest.approx((12 * 0.75 + 2 * 0.5) / 14)
    assert means.tasks.tolist() == [2] * 4


def test_written_tables_mark_what_is_too_few(folders: list[Path]) -> None:
    table = benchmark_table(folders)
    csv, markdown, latex = write_table(table, folders[0].parent)
    assert pd.read_csv(csv).hard_n.max() == 12
    (row,) = [line for line in markdown.read_text().splitlines() if "| docs | anls | mine |" in line]
    assert "| (2) | 50.0 (20.0-80.0) |" in row
    assert "| 12 | 75.0 (46.8-91.1) |" in markdown.read_text()
    assert r"smaller-images & 20.0 & 25.0 (" in latex.read_text().replace("mine-", "")
    assert [few(9), few(10), few(math.nan)] == ["(9)", "10", ""]


def test_shares_and_scores_above_one() -> None:
    assert [percent(2.02), percent(0.5), percent(math.nan)] == ["202.0", "50.0", ""]
    assert [score_text(1512.0), score_text(0.5), score_text(math.nan)] == ["1512.0", "50.0", ""]
    assert with_interval(0.5, 0.25, 1.125) == "50.0 (25.0-112.5)"
    assert with_interval(1.0, 1.0, 1.0) == with_interval(1.0, math.nan, math.nan) == "100.0"


def test_the_figure_has_a_row_per_task_and_their_mean(folders: list[Path], tmp_path: Path) -> None:
    table = benchmark_table(folders)
    drawn = task_retention(table)
    assert drawn is not None
    figure, shown = drawn
    (panel,) = figure.axes
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "docs (20)",
        "pope (20)",
        "Mean (2 tasks)",
    ]
    assert set(shown.baseline) == {"", "random", "smaller-images"}
    assert shown[(shown.task == MEAN) & (shown.baseline == "")].retention.item() == pytest.approx(
        averages(table).set_index("method").retention[OWN]
    )
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["Schedule", "Random tokens", "Smaller images"]
    paths = write_task_retention(table, tmp_path / "retention")
    assert [path.suffix for path in paths] == [".pdf", ".png", ".csv"]
    assert matplotlib.image.imread(paths[1]).shape[1] == 3.3 * 300


def test_every_schedule_has_a_panel(folders: list[Path]) -> None:
    tasks = {f"ours_task_{name}": {"acc": [1.0, 0.0]} for name in "ab"}
    out = folders[0].parent / "several"
    methods = [write_method(out, FULL, tasks, None)]
    methods += [write_method(out, f"s{number}", tasks, f"s{number}.json") for number in range(4)]
    for folder in methods[1:]:
        write_records(folder / "record.json", {}, {"schedule": f"{folder.name}.json", "baseline": None})
    drawn = task_retention(benchmark_table(methods))
    assert drawn is not None
    visible = [panel for panel in drawn[0].axes if panel.get_visible()]
    assert [panel.get_title() for panel in visible] == ["s0", "s1", "s2", "s3"]


def test_no_retention_no_figure(folders: list[Path], tmp_path: Path) -> None:
    assert write_task_retention(benchmark_table(folders[:1]), tmp_path / "retention") == []
