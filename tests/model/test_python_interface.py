"""`import schedule_finder`: the steps as functions and methods, and the files of a run as tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import schedule_finder
from pruning_runtime import Schedule, ScheduleError
from schedule_finder import Run, find_schedule, load_run, profile
from schedule_finder.errors import InputError
from tests.support.command_line import call
from tests.support.tiny_folder import write_jsonl, write_llava_folder


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("elsewhere")
    return {
        "backbone": str(write_llava_folder(folder / "llava")),
        "dataset": str(write_jsonl(folder / "data", 16)),
    }


@pytest.fixture(scope="module")
def run(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with everything but figures and report; not to be changed."""
    out = tmp_path_factory.mktemp("run")
    schedule = find_schedule(
        **given, out=out, budget=0.4, solver="paper", samples=10, eval_samples=6, batch_size=4
    )
    made = load_run(out)
    assert made.schedule == schedule
    made.evaluate(baselines=["random"], max_new_tokens=2)
    return made


def test_the_package_offers_a_small_documented_interface() -> None:
    assert schedule_finder.__all__ == ["Run", "find_schedule", "load_run", "profile"]
    for name in schedule_finder.__all__:
        assert getattr(schedule_finder, name).__doc__
    assert set(schedule_finder.__all__) <= set(dir(schedule_finder))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = schedule_finder.nothing


def test_importing_it_is_light() -> None:
    code = (
        "import sys, schedule_finder; schedule_finder.load_run; "
        "print(sorted({'torch', 'transformers', 'pandas', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tables_have_plain_columns(run: Run) -> None:
    assert list(run.samples.columns[:4]) == ["id", "source", "row", "use"]
    assert run.samples.use.value_counts().to_dict() == {"calibration": 10, "held_out": 6}
    found = run.profile
    curves = found.to_pandas()
    assert list(curves.columns) == [
        "id",
        "layer",
        "num_vision",
        "num_text_queries",
        "vision_mass",
        "vision_entropy",
    ]
    assert len(curves) == 10 * len(found.layers)
    row = curves[(curves.id == found.ids[3]) & (curves.layer == 2)].iloc[0]
    assert row.vision_mass == found.curves["vision_mass"][3, found.layers.index(2)]
    tokens = found.tokens_to_pandas(found.ids[3])
    assert (
        tokens[(tokens.layer == 2) & (tokens.token == 5)].last_token.item()
        == found.scores["last_token"][3][2, 5]
    )
    with pytest.raises(InputError, match="no sample 'nobody'"):
        found.tokens_to_pandas("nobody")
    assert list(run.change_points.columns) == ["detector", "layer", "followed"]
    assert {"method", "budget", "question_type", "score"} <= set(run.evaluation.columns)
    assert len(run.answers[run.answers.method == "full"]) == 6
    with pytest.raises(InputError, match="measure again"):
        _ = run.sensitivity


def test_the_command_line_and_python_continue_each_other(
    run: Run, given: dict[str, Any], tmp_path: Path
) -> None:
    assert call("inspect", run.folder)["steps"]["evaluate"]["state"] == "done"
    call(
        "profile",
        given["backbone"],
        "--dataset",
        given["dataset"],
        "--samples",
        10,
        "--eval-samples",
        6,
        "--out",
        tmp_path / "run",
    )
    other = profile(**given, out=tmp_path / "run", samples=10, eval_samples=6)
    pd.testing.assert_frame_equal(other.profile.to_pandas(), run.profile.to_pandas())
    other.detect()
    assert other.search(0.4, solver="paper").stages == run.schedule.stages
    with pytest.raises(InputError, match="another samples 10"):
        profile(**given, out=tmp_path / "run", samples=11, eval_samples=6)


def test_search_measures_and_keeps_its_results_by_name(
    run: Run, given: dict[str, Any], tmp_path: Path
) -> None:
    other = profile(**given, out=tmp_path / "run", samples=10, eval_samples=2, batch_size=4)
    other.detect("token_curve")
    assert other.detections.default == "token_curve"
    seen: list[tuple[int, int]] = []
    measured = other.search(0.5, scorer="text_guided", name="mine", progress=lambda *done: seen.append(done))
    assert seen[-1][0] == seen[-1][1] > 0
    assert other.schedules == {"mine": other.schedule}
    assert measured.scorer.name == "text_guided"
    assert set(other.sensitivity.columns) >= {"layer", "keep_ratio", "id", "kl"}
    again = other.search(0.3, scorer="text_guided", use_model=False)
    assert set(other.schedules) == {"mine", "30pct-processed-sensitivity-text_guided"}
    assert again.budget is not None
    table = other.evaluate(schedules=["mine"], baselines="none", eval_samples=1, max_new_tokens=1)
    assert set(table.method) == {"full", "mine"}


def test_what_cannot_be_used_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a dataset"):
        profile("nowhere", out=tmp_path / "run")
    for wrong, message in (
        ({"solver": "magic"}, "solver 'magic': choose sensitivity"),
        ({"kind": "tokens"}, "kind 'tokens': choose processed"),
        ({"budget": 1.5}, "above 0 and at most 1"),
    ):
        with pytest.raises(InputError, match=message):
            run.search(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="metric 'luck': choose"):
        run.evaluate(metric="luck")
    with pytest.raises(InputError, match="no run here"):
        load_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_results_says_what_to_call(given: dict[str, Any], tmp_path: Path) -> None:
    begun = profile(**given, out=tmp_path / "run", samples=4, eval_samples=2)
    assert repr(begun) == f"<Run {tmp_path / 'run'}: {given['backbone']}, profile>"
    with pytest.raises(InputError, match="call `evaluate` first"):
        _ = begun.evaluation
    with pytest.raises(ScheduleError, match="no such file"):
        _ = begun.schedule


def test_a_run_shows_its_steps(run: Run) -> None:
    assert repr(run).endswith("profile, detect, schedule, evaluate>")
    html = run._repr_html_()
    assert "<td>evaluate</td><td>done</td>" in html
    assert isinstance(run.schedules["40pct-processed-paper"], Schedule)


def test_report_and_figures(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("altair", reason="the extra `report` is not installed")
    assert run.report(tmp_path / "mine.html") == tmp_path / "mine.html"
    assert 'data-viewer="r0"' in (tmp_path / "mine.html").read_text()
    assert {path.suffix for path in run.figures()} == {".pdf", ".png", ".csv"}
