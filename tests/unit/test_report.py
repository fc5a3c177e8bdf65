"""The report: words, tables and charts from a run's files, in one file that loads nothing."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pruning_runtime import Schedule
from pruning_runtime.schedule import Budget
from schedule_finder.errors import InputError
from schedule_finder.evaluation.outcomes import COLUMNS
from schedule_finder.evidence import AnswerQuality, HeldOutResult, HeldOutSummary, digest
from schedule_finder.figures.run_data import RunData
from schedule_finder.report.viewer import (
    StageTokens,
    Viewer,
    ViewerPanel,
    ViewerSample,
    answers_digest,
    as_bytes,
    as_data_uri,
    current_viewer,
)
from schedule_finder.run.folder import Run
from tests.support.finished_run import LAYERS, SIDE, TOKENS, write_run

pytest.importorskip("altair", reason="the extra `report` is not installed")

from schedule_finder import report
from schedule_finder.report.facts import methods_table, question_types_table, stages_table, verdict, warnings
from schedule_finder.report.page import render

HOSTILE = "</script><img src=x onerror=alert(1)> what is $5 & <b>6</b>?"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with an evaluation of 200 samples at a budget of 20 % and answers of all of them."""
    made = Run(tmp_path / "planted")
    made.folder.mkdir()
    options = {
        "backbone": "planted",
        "dataset": ["a", "b"],
        "samples": 12,
        "eval_samples": 200,
        "seed": 0,
        "columns": {},
    }
    Run.begin(made.folder, "adaptinfer-profile run planted", options)
    write_run(made)
    made.viewer.unlink()
    schedule = Schedule.load(made.schedule)
    budget = Budget(kind="processed", target=0.2, processed=0.2, published=0.2)
    schedule.model_copy(update={"budget": budget}).save(made.schedule)
    return made


def evaluate(
    run: Run, scores: dict[str, float], differences: dict[str, tuple[float, float, float]] | None = None
) -> None:
    """Write an evaluation: ``scores`` of methods, and ``differences`` of baselines from the schedule."""
    name = digest(Schedule.load(run.schedule))
    rows = []
    for method, score in scores.items():
        own = method != "full"
        one = dict.fromkeys(COLUMNS, np.nan) | {
            "method": method, "budget": 0.2 if own else 1.0, "question_type": "all", "n": 200, "metric": "exact_match",
            "exact_match": score, "score": score, "ci_low": score - 0.03, "ci_high": min(1.0, score + 0.03),
            "score_low": score - 0.03, "score_high": min(1.0, score + 0.03), "agreement": score, "kl": 0.1,
            "processed": 0.2 if own else 1.0, "published": 0.2, "flops": 0.3 if own else 1.0,
            "kv_bytes": 100.0, "prefill_ms": 5.0, "scorer": "uniform_text" if own else None,
            "schedule": "mine" if own else None, "digest": name if own else None,
        }  # fmt: skip
        if differences and method in differences:
            one |= dict(
                zip(("difference", "difference_low", "difference_high"), differences[method], strict=True)
            )
        rows += [one, one | {"question_type": "where", "n": 100}, one | {"question_type": "count", "n": 100}]
    pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(run.evaluation, index=False)
    results = {method: HeldOutResult(n=200, score=score) for method, score in scores.items()}
    HeldOutSummary(schedule=name, name="mine", budget=0.2, samples=200, methods=results).save(
        run.evaluation_summary
    )
    write_answers(run, scores["full"], scores["schedule"])


def write_answers(run: Run, full: float, pruned: float, samples: int = 200) -> None:
    rows = [
        {
            "id": f"held-{number:03d}", "question_type": "where", "method": method, "schedule": "mine", "budget": budget,
            "answer": "yes", "score": float(number < score * samples), "agrees": number < score * samples, "kl": 0.1,
        }
        for method, score, budget in (("full", full, 1.0), ("schedule", pruned, 0.2))
        for number in range(samples)
    ]  # fmt: skip
    pd.DataFrame(rows).to_parquet(run.answers)


def write_viewer(run: Run, samples: int = 24) -> Viewer:
    """Samples with a known attention and known kept tokens."""
    picture = as_data_uri(Image.new("RGB", (64, 64), (90, 120, 200)), 320)
    attention, peaks = as_bytes(np.random.default_rng(0).random((LAYERS, TOKENS)))
    made = [
        ViewerSample(
            id=f"held-{number}",
            question=HOSTILE if number == 0 else f"question {number}",
            question_type="where",
            references=["yes"],
            full_answer="yes",
            pruned_answer="no" if number < 3 else "yes",
            full_score=1.0,
            pruned_score=float(number >= 3),
            kl=0.2,
            panels=[ViewerPanel(picture=picture, rows=SIDE, columns=SIDE)],
            places=[(0, token // SIDE, token % SIDE) for token in range(TOKENS)],
            layers=list(range(LAYERS)),
            attention=attention,
            peaks=peaks,
            stages=[
                StageTokens(layer=2, kept=list(range(0, TOKENS, 2))),
                StageTokens(layer=5, kept=[0, 9, 18]),
            ],
            note="a note" if number == 1 else None,
        )
        for number in range(samples)
    ]
    viewer = Viewer(
        schedule=digest(Schedule.load(run.schedule)),
        answers=answers_digest(run),
        num_layers=LAYERS,
        samples=made,
    )
    viewer.save(run.viewer)
    return viewer


def texts(run: Run) -> list[tuple[str, str]]:
    return [(finding.level, finding.text) for finding in verdict(RunData(run))]


def embedded(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


# --- verdict ---


def test_a_schedule_that_loses_nothing_and_beats_the_controls_is_good(run: Run) -> None:
    evaluate(run, {"full": 0.9, "schedule": 0.9, "random": 0.4}, {"random": (-0.5, -0.6, -0.4)})
    (loss, control, best) = texts(run)
    assert loss[0] == control[0] == best[0] == "good"
    assert "20% of the vision tokens, exact match is 90.0%; the full model has 90.0%" in loss[1]
    assert "-1.9 to +1.9 points" in loss[1]
    assert control[1] == "Better than random tokens (+50.0 points, 95 % interval +40.0 to +60.0)."


def test_equal_scores_of_few_samples_rule_out_no_loss(run: Run) -> None:
    evaluate(run, {"full": 0.9, "schedule": 0.9})
    write_answers(run, 0.9, 0.9, samples=30)
    assert texts(run)[0][0] == "caution"


def test_a_schedule_that_takes_longer_than_the_full_model_is_a_problem(run: Run) -> None:
    evaluate(run, {"full": 0.9, "schedule": 0.9})
    assert not any("no gain" in text for _, text in texts(run))
    table = pd.read_csv(run.evaluation)
    table.loc[table.method == "schedule", "prefill_ms"] *= 1.25
    table.to_csv(run.evaluation, index=False)
    assert [
        level for level, text in texts(run) if "no gain on this device: its prefill took 125%" in text
    ] == ["bad"]


def test_the_report_says_how_many_samples_were_evaluated(run: Run) -> None:
    evaluate(run, {"full": 0.9, "schedule": 0.9})
    assert "200 held out (asked for), 200 evaluated" in render([run], [None])
    pd.read_csv(run.evaluation).assign(n=10).to_csv(run.evaluation, index=False)
    assert "200 held out (asked for), 10 evaluated" in render([run], [None])


def test_losses_and_better_baselines_are_problems(run: Run) -> None:
    changes = {"random": (0.1, 0.02, 0.2), "strided": (-0.01, -0.1, 0.1), "divprune": (0.2, -0.01, 0.3)}
    evaluate(run, {"full": 0.9, "schedule": 0.6, "random": 0.7, "strided": 0.59, "divprune": 0.8}, changes)
    found = texts(run)
    assert [level for level, _ in found] == ["bad", "bad", "caution", "caution"]
    assert "Pruning lowers the score." in found[0][1]
    assert found[1][1].startswith("Worse than random tokens (-10.0 points")
    assert found[2][1].startswith("Not shown to be better than strided tokens")
    assert found[3][1] == "The baseline DivPrune scores 20.0 points more; the interval includes zero."


def test_without_evaluation_or_schedule_the_verdict_says_what_to_run(run: Run) -> None:
    run.evaluation.unlink()
    assert "not evaluated" in texts(run)[0][1]
    run.schedule.unlink()
    assert "No schedule yet" in texts(run)[0][1]


def test_warnings_name_few_samples_skipped_samples_and_bad_answers(run: Run) -> None:
    evaluate(run, {"full": 0.9, "schedule": 0.9})
    table = pd.read_csv(run.evaluation).assign(n=50)
    table.to_csv(run.evaluation, index=False)
    AnswerQuality(samples=4, warning="answers are empty: check the prompt").save(run.first_answers)
    document = json.loads(run.path.read_text())
    document["steps"]["profile"] = {"state": "done", "skipped": 3}
    run.path.write_text(json.dumps(document))
    found = warnings(run, RunData(run))
    assert any("only 50 held-out samples" in line for line in found)
    assert any("answers are empty" in line for line in found)
    assert any("3 samples were skipped by `profile`" in line for line in found)


# --- tables ---


def test_tables_show_stages_methods_and_question_types(run: Run) -> None:
    evaluate(run, {"full": 0.9, "schedule": 0.8, "random": 0.4})
    data = RunData(run)
    stages, methods, kinds = stages_table(data), methods_table(data), question_types_table(run, data)
    assert stages is not None
    assert [row[0].text for row in stages.rows] == ["after layer 2", "after layer 5"]
    assert [row[2].text for row in stages.rows] == ["32", "8"]
    assert methods is not None
    assert [row[0].text for row in methods.rows] == ["Full model", "Schedule (uniform text)", "Random tokens"]
    assert [cell.text for cell in methods.rows[1]][2:4] == ["80.0", "77.0 to 83.0"]
    assert methods.rows[1][7].text == "30"
    assert kinds is not None
    assert [(row[0].text, row[4].text) for row in kinds.rows] == [("where", "-10.0"), ("count", "-10.0")]


# --- the page ---


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_is_one_small_file_without_links_to_elsewhere(run: Run) -> None:
    evaluate(run, {"full": 0.9, "schedule": 0.8, "random": 0.4})
    write_viewer(run)
    path = report.write_report([run], run.report)
    assert path.stat().st_size < 5_000_000
    html = path.read_text(encoding="utf-8")
    parser = _Links()
    parser.feed(html)
    assert all(link.startswith(("data:", "#")) for link in parser.found)
    assert "default-src 'none'" in html
    data = embedded(html)
    names = "staircase accuracy attention shift mass allocation sensitivity loss front"
    assert set(data["charts"]) == {f"r0-{name}" for name in names.split()}
    assert len(data["viewers"]["r0"]["samples"]) == 24


def test_the_sensitivity_charts_have_intervals(run: Run) -> None:
    charts = embedded(render([run], [None]))["charts"]
    cells = rows_of(charts["r0-sensitivity"])
    assert all(" to " in cell["interval"] for cell in cells)
    bars = rows_of(charts["r0-loss"])
    assert all(bar["low"] <= bar["loss"] <= bar["high"] for bar in bars)
    assert max(bar["high"] for bar in bars) > 0


def test_attention_allocation_adds_up(run: Run) -> None:
    parts = rows_of(embedded(render([run], [None]))["charts"]["r0-allocation"])
    assert {part["part"] for part in parts} == {
        "Text before the image",
        "Vision tokens",
        "Question",
        "Answer so far",
    }
    assert sum(part["share"] for part in parts) == pytest.approx(LAYERS)


def test_a_method_and_its_variant_without_merging_share_a_colour(run: Run) -> None:
    evaluate(run, {"full": 0.9, "schedule": 0.8, "random": 0.4, "random, not merged": 0.3})
    rows = rows_of(embedded(render([run], [None]))["charts"]["r0-accuracy"])
    variants = {row["variant"] for row in rows if row["label"] == "Random tokens"}
    assert variants == {"as the schedule", "discarded"}


def rows_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The first table of a chart."""
    return next(iter(spec["datasets"].values()))


def test_text_of_the_data_cannot_become_markup(run: Run) -> None:
    evaluate(run, {"full": 0.9, "schedule": 0.8})
    write_viewer(run)
    html = render([run], [None])
    assert HOSTILE not in html
    assert embedded(html)["viewers"]["r0"]["samples"][0]["question"] == HOSTILE


def test_a_run_without_a_viewer_says_why(run: Run) -> None:
    html = render([run], ["the backbone is not here <&>"])
    assert "The viewer is left out: the backbone is not here &lt;&amp;&gt;." in html
    assert "r0" not in embedded(html)["viewers"]


def test_a_run_with_a_schedule_only_has_a_report(tmp_path: Path, run: Run) -> None:
    for path in run.folder.iterdir():
        if path.name not in ("run.json", "4_schedule.json"):
            if path.is_dir():
                continue
            path.unlink()
    html = render([Run(run.folder)], [None])
    assert "was not evaluated" in html


def test_several_runs_are_compared(run: Run) -> None:
    evaluate(run, {"full": 0.9, "schedule": 0.8})
    html = render([run, run], [None, None])
    assert "Comparison of 2 runs" in html
    assert "comparison" in embedded(html)["charts"]
    assert html.count("Pruning lowers the score.") == 4


# --- the viewer's file ---


def test_the_viewer_belongs_to_one_schedule_and_one_evaluation(run: Run) -> None:
    evaluate(run, {"full": 0.9, "schedule": 0.8})
    made = write_viewer(run, 2)
    name = digest(Schedule.load(run.schedule))
    assert current_viewer(run, name) == made
    assert current_viewer(run, "sha256:other") is None
    write_answers(run, 0.9, 0.7)
    assert current_viewer(run, name) is None
    run.viewer.write_text("{}")
    with pytest.raises(InputError, match="write the report again"):
        current_viewer(run, name)


def test_attention_keeps_its_proportions_in_bytes() -> None:
    values, peaks = as_bytes(np.array([[1.0, 2.0, 5.0], [0.0, 0.0, 0.0]]))
    assert list(base64.b64decode(values)) == [51, 102, 255, 0, 0, 0]
    assert peaks == [1.88, 0.0]
    assert as_bytes(np.zeros((0, 0))) == ("", [])


def test_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_NEEDED", {"no_such_module": "no-such-package", "json": "json"})
    with pytest.raises(
        InputError, match=r"needs no-such-package; install the extra: pip install 'adaptinfer\[report\]'"
    ):
        report.check_packages()


def test_help_does_not_import_the_plotting_library() -> None:
    code = (
        "import sys; import schedule_finder.cli.commands; "
        "print(sorted({'torch', 'altair', 'vl_convert', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
