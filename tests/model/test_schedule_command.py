"""`adaptinfer-profile schedule` on a folder and a data set made elsewhere: every solver, rule and kind of budget."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from pruning_runtime import Schedule
from pruning_runtime.schedule import BackboneIdentity, Budget, ScorerChoice, Stage
from pruning_runtime.scorers import SCORERS
from pruning_runtime.vllm.setting import servable_scorers, why_not_served
from schedule_finder.cli.commands import app
from schedule_finder.evidence import HeldOutResult, HeldOutSummary, RuleProbe, digest
from schedule_finder.measuring.sensitivity_table import SensitivityTable
from schedule_finder.run.folder import Run
from schedule_finder.search import Search
from schedule_finder.solvers import SOLVERS
from tests.support.command_line import call
from tests.support.tiny_folder import write_jsonl, write_llava_folder

MEASURED = ("4_sensitivity.parquet", "4_latency.json")
SCREEN = 24, 80
"""Lines and columns of a terminal."""


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a profile and change points, on which nothing was measured yet; not to be changed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    data = write_jsonl(folder / "data", 20)
    checkpoint = write_llava_folder(folder / "llava")
    call(
        "profile",
        checkpoint,
        "--dataset",
        data,
        "--samples",
        16,
        "--eval-samples",
        4,
        "--out",
        folder / "run",
    )
    call("detect", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def measured(profiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a sensitivity table; not to be changed."""
    out = shutil.copytree(profiled, tmp_path_factory.mktemp("measured") / "run")
    call("schedule", out, "--budget", "40%")
    return out


@pytest.fixture
def bare(profiled: Path, tmp_path: Path) -> Path:
    """A copy of `profiled`."""
    return shutil.copytree(profiled, tmp_path / "run")


@pytest.fixture
def run(measured: Path, tmp_path: Path) -> Path:
    """A copy of `measured`."""
    return shutil.copytree(measured, tmp_path / "run")


def solved(run: Path) -> Schedule:
    return Schedule.load(run / "4_schedule.json")


def times(run: Path) -> dict[str, int]:
    """When each file of measurements was last written."""
    return {name: (run / name).stat().st_mtime_ns for name in MEASURED if (run / name).exists()}


@pytest.mark.parametrize(
    "solver", [pytest.param(name, marks=pytest.mark.slow) if name == "grid" else name for name in SOLVERS]
)
def test_every_solver_by_name(run: Path, solver: str) -> None:
    call("schedule", run, "--solver", solver, "--budget", "40%")
    schedule = solved(run)
    assert schedule.evidence["solver"]["solver"] == solver
    assert schedule.budget is not None
    assert schedule.budget.processed == pytest.approx(0.4, rel=0.01)
    assert json.loads((run / "run.json").read_text())["steps"]["schedule"]["solver"] == solver


def test_a_schedule_for_vllm_says_what_the_restriction_costs(run: Path) -> None:
    document = call("schedule", run, "--budget", "40%", "--for", "vllm")
    assert document["name"] == "40pct-processed-for-vllm"
    schedule = solved(run)
    assert why_not_served(schedule) is None
    (stage,) = schedule.stages
    assert stage.layer == -1
    assert schedule.budget is not None
    assert schedule.budget.processed == pytest.approx(0.4, rel=0.01)
    policies = schedule.evidence["solver"]["policies"]
    assert set(policies) == set(servable_scorers())
    serving = schedule.evidence["serving"]
    free = Schedule.load(run / "4_schedules" / "40pct-processed-sensitivity.json")
    assert serving["unrestricted_change"] == pytest.approx(
        free.evidence["solver"]["measured_change"], abs=1e-5
    )
    assert [one["layer"] for one in serving["unrestricted_stages"]] == [one.layer for one in free.stages]
    low, high = serving["worse_by"]
    assert low - 1e-5 <= serving["measured_change"] - serving["unrestricted_change"] <= high + 1e-5
    call("schedule", run, "--budget", "40%", "--for", "vllm", "--scorer", "strided")
    assert solved(run).scorer.name == "strided"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--for", "sglang"), "--for 'sglang': choose vllm"),
        (("--for", "vllm", "--pareto"), "leave --pareto away"),
        (("--for", "vllm", "--no-model"), "leave --no-model away"),
        (("--for", "vllm", "--scorer", "mmtok"), "--scorer mmtok: .* reads the text"),
        (("--for", "vllm", "--dropped-tokens", "merge"), "--dropped-tokens merge: vllm cannot merge"),
    ],
)
def test_what_vllm_cannot_run_is_refused(run: Path, options: tuple[str, ...], message: str) -> None:
    assert re.search(message, call("schedule", run, "--budget", "40%", *options, code=2))


@pytest.mark.parametrize("dropped_tokens", ["discard", "merge"])
def test_discard_or_merge_can_be_asked_for(run: Path, dropped_tokens: str) -> None:
    call("schedule", run, "--dropped-tokens", dropped_tokens, "--budget", "40%")
    schedule = solved(run)
    assert schedule.dropped_tokens == dropped_tokens
    policies = schedule.evidence["solver"]["policies"]
    assert {name.endswith("merge") for name in policies} == {dropped_tokens == "merge"}


def test_another_number_of_answer_tokens_is_measured_again(run: Path) -> None:
    assert SensitivityTable.load(run / "4_sensitivity.parquet").answer_tokens == 16
    assert solved(run).evidence["solver"]["answer_tokens"] == 16
    before = times(run)
    call("schedule", run, "--solver", "dop", "--budget", "50%", "--answer-tokens", 2)
    assert times(run) != before
    assert SensitivityTable.load(run / "4_sensitivity.parquet").answer_tokens == 2
    assert solved(run).evidence["solver"]["answer_tokens"] == 2
    # Without the model, what was measured last counts.
    before = times(run)
    call("schedule", run, "--solver", "dop", "--budget", "40%", "--no-model")
    assert (times(run), solved(run).evidence["solver"]["answer_tokens"]) == (before, 2)


def test_the_old_option_for_dropped_tokens_still_works(run: Path) -> None:
    call("schedule", run, "--residual", "none", "--solver", "pyramid", "--budget", "40%")
    assert solved(run).dropped_tokens == "discard"
    line = call("schedule", run, "--residual", "kept", "--budget", "40%", code=2)
    assert "--dropped-tokens 'kept': choose auto, discard, merge" in line


@pytest.mark.parametrize("scorer", ["text_guided", "last_token"])
def test_a_scorer_that_is_asked_for_is_compared_with_the_controls_only(run: Path, scorer: str) -> None:
    call("schedule", run, "--scorer", scorer, "--dropped-tokens", "discard", "--budget", "40%")
    assert solved(run).scorer.name == scorer
    assert set(solved(run).evidence["solver"]["policies"]) == {scorer, "strided", "random"}


def test_a_rule_that_was_not_measured_is_measured_and_the_table_kept_for_it(run: Path) -> None:
    before = times(run)
    call("schedule", run, "--budget", "60%")
    assert times(run) == before
    call("schedule", run, "--budget", "60%", "--scorer", "last_token")
    assert times(run) != before
    assert set(pd.read_parquet(run / "4_sensitivity.parquet").scorer) == {"last_token"}


def test_budgets_of_cache_entries_are_met(run: Path) -> None:
    before = times(run)
    found = call("schedule", run, "--budget", "60%", "--budget-kind", "kv")
    assert found["budget"]["kv"] == pytest.approx(0.6, rel=0.01)
    assert times(run) == before


@pytest.mark.slow
def test_latency_is_measured_once_and_then_serves_every_budget(tmp_path: Path) -> None:
    """On the demo backbone: on smaller ones a stage takes longer than what it saves."""
    out = tmp_path / "run"
    call("profile", "demo", "--samples", 12, "--eval-samples", 0, "--out", out)
    call("detect", out)
    asked = ("schedule", out, "--budget-kind", "latency", "--solver", "paper")
    found = call(*asked, "--budget", "70%")
    assert found["budget"]["latency"] == pytest.approx(0.7, rel=0.01)
    model = json.loads((out / "4_latency.json").read_text())
    assert model["tokens"] == sorted(model["tokens"])
    assert min(model["layer_ms"]) > 0
    before = times(out)
    call(*asked, "--budget", "80%")
    found = call(*asked, "--budget", "90%", "--no-model")
    assert found["budget"]["latency"] == pytest.approx(0.9, rel=0.01)
    assert times(out) == before
    # Milliseconds are a fraction of what the whole takes here.
    search = Search(Run(out))
    whole = search.target(1.0, "latency").full_ms
    found = call(*asked, "--budget", f"{0.75 * whole}ms", "--no-model")
    assert found["budget"]["latency"] == pytest.approx(0.75, rel=0.01)
    # Every other schedule of the run says what it takes, too.
    other = call("schedule", out, "--budget", "40%", "--solver", "pyramid")
    assert other["budget"]["latency"] > 0


@pytest.mark.parametrize(
    "asked", [(), ("--budget-kind", "latency", "--solver", "paper"), ("--pareto",), ("--solver", "grid")]
)
def test_without_a_model_and_with_nothing_stored_one_line_says_so(bare: Path, asked: tuple[str, ...]) -> None:
    line = call("schedule", bare, "--no-model", *asked, code=2)
    assert "without --no-model" in line or "where the backbone can be loaded" in line
    assert not (bare / "4_schedule.json").exists()
    assert not (bare / "4_pareto.csv").exists()


def test_the_stored_table_is_enough_for_another_budget_without_the_backbone(run: Path) -> None:
    document = json.loads((run / "run.json").read_text())
    document["options"] |= {"backbone": str(run / "gone"), "dataset": str(run / "gone.jsonl")}
    (run / "run.json").write_text(json.dumps(document))
    call("schedule", run, "--no-model", "--budget", "55%")
    schedule = solved(run)
    assert schedule.budget is not None
    assert schedule.budget.processed == pytest.approx(0.55, rel=0.01)
    assert "measured_kl" not in schedule.evidence["solver"]
    assert schedule.evidence["solver"]["predicted_change"] >= 0


@pytest.mark.slow
def test_the_front_is_a_table_and_a_figure(run: Path) -> None:
    schedule = (run / "4_schedule.json").read_text()
    found = call("schedule", run, "--pareto")
    table = pd.read_csv(run / "4_pareto.csv")
    assert len(found["pareto"]) == len(table) >= 5
    assert table.budget.tolist() == sorted(table.budget)
    assert table.processed.tolist() == pytest.approx(table.budget.tolist(), rel=0.01)
    assert table[["predicted_change", "measured_change", "measured_kl", "flops", "kv"]].notna().all(axis=None)
    # A schedule is measured, not predicted: another one than the best predicted may be chosen.
    assert table.predicted_change.iloc[0] > table.predicted_change.iloc[-1]
    assert sorted(path.name for path in (run / "6_figures").glob("4_pareto.*")) == [
        "4_pareto.csv",
        "4_pareto.pdf",
        "4_pareto.png",
    ]
    assert {Path(path).name for path in found["figures"]} == {
        path.name for path in (run / "6_figures").iterdir()
    }
    assert (run / "4_schedule.json").read_text() == schedule


def test_the_front_without_a_model_is_predicted_from_the_stored_table(run: Path) -> None:
    found = call("schedule", run, "--pareto", "--no-model")
    assert (run / "6_figures" / "4_pareto.png") in map(Path, found["figures"])
    table = pd.read_csv(run / "4_pareto.csv")
    assert table.predicted_change.notna().all()
    assert table.measured_change.isna().all()


def test_a_front_of_a_solver_that_predicts_nothing_is_a_table_only(run: Path) -> None:
    found = call("schedule", run, "--pareto", "--solver", "pyramid")
    assert found["figures"] == []
    assert len(found["pareto"]) >= 5


# ---- inspect


def screen_of(*arguments: Any) -> list[str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.stdout.rstrip().splitlines()


def test_inspecting_a_schedule_says_what_it_costs_why_and_how_sure(run: Path) -> None:
    lines = screen_of("inspect", run / "4_schedule.json")
    said = " ".join(" ".join(lines).split())
    schedule = solved(run)
    costs = schedule.budget
    assert costs is not None
    for name in ("processed", "published", "flops", "kv"):
        assert f"{name} {100 * getattr(costs, name):.1f}" in said
    assert "asked for 40.0" in said
    assert f"dropped tokens: {schedule.dropped_tokens}" in said
    assert all((stage.scorer or schedule.scorer).name in said for stage in schedule.stages)
    rules = RuleProbe.load(run / "4_rules.json")
    assert rules is not None
    assert {rule.scorer for rule in rules.results if rule.place == "decoder"} == set(SCORERS) - {"evs"}
    assert "evs" in rules.refused  # an image is no video
    for place, words in (("pre_decoder", "before the decoder"), ("decoder", "in the decoder")):
        best = rules.ranked(place)[0]
        assert (
            f"scorers {words}, answer change of single stages on {best.samples} samples: {best.scorer}"
            in said
        )
    assert "layers chosen in 20 resamples" in said
    assert "other policies on these stages" in said


def full_schedule(stages: int) -> Schedule:
    """Everything that a schedule's evidence can hold, at its longest."""
    policies = ("text_guided, merge", "uniform_text, merge", "last_token, merge", "text_guided")
    return Schedule(
        backbone=BackboneIdentity(name="organisation/some-llava-1.5-7b-hf", model_type="llava", num_layers=32),
        stages=tuple(
            Stage(layer=layer, keep_ratio=0.9 - 0.02 * layer, keep_tokens=500 - 10 * layer)
            for layer in range(stages)
        ),
        scorer=ScorerChoice(name="text_guided"),
        dropped_tokens="merge",
        budget=Budget(
            kind="latency", target=0.1234, processed=0.1234, published=0.1123, flops=0.2345, kv=0.2345, latency=0.1234
        ),
        evidence={
            "solver": {
                "solver": "sensitivity",
                "placed_by": "measured sensitivity",
                "predicted_change": 0.00123,
                "measured_samples": 32,
                "measured_change": 0.00123,
                "measured_kl": 0.00123,
                "chosen_on_samples": 64,
                "measured_schedules": 123,
                "by_number_of_stages": {str(n): {"predicted_change": 0.00123} for n in range(1, 5)},
                "policies": {
                    name: {"measured_kl": 0.00123, "measured_change": 0.00123}
                    | {"worse_by": [0.0, 0.0] if not index else [-0.00123, 0.00123]}
                    for index, name in enumerate(policies)
                },
                "confidence": {
                    "level": 0.9,
                    "ratio_low": [0.1234] * 32,
                    "ratio_high": [0.9876] * 32,
                    "resamples": 20,
                    "layers": {f"{n},10,20,30": 4 for n in range(5)},
                },
            },
        },
    )  # fmt: skip


@pytest.mark.parametrize("stages", [1, 4, 31])
def test_the_fullest_schedule_fits_one_screen(tmp_path: Path, stages: int) -> None:
    schedule = full_schedule(stages)
    schedule.save(tmp_path / "4_schedule.json")
    result = HeldOutResult(n=2250, exact_match=0.987, ci_low=0.981, ci_high=0.991)
    methods = {"schedule": result, "full": result}
    summary = HeldOutSummary(schedule=digest(schedule), budget=0.1234, samples=2250, methods=methods)
    summary.save(tmp_path / "5_evaluation.json")
    lines = screen_of("inspect", tmp_path / "4_schedule.json")
    assert len(lines) <= SCREEN[0]
    assert max(map(len, lines)) <= SCREEN[1]
    said = " ".join(" ".join(lines).split())
    assert "exact match 98.7 % (98.1-99.1), full model 98.7 % (98.1-99.1), n = 2250" in said
    assert "uniform_text, merge: answer change 0.12 %, KL 0.0012 (-0.12 to 0.12 points)" in said
    for stage in schedule.stages:
        assert f"{100 * stage.keep_ratio:.1f}" in said


def test_an_evaluation_of_another_schedule_is_not_shown_as_this_ones(tmp_path: Path) -> None:
    schedule = full_schedule(1)
    schedule.save(tmp_path / "4_schedule.json")
    result = HeldOutResult(n=10, exact_match=0.5, ci_low=0.4, ci_high=0.6)
    other = HeldOutSummary(
        schedule=digest(full_schedule(4)),
        budget=0.1,
        samples=10,
        methods={"schedule": result, "full": result},
    )
    other.save(tmp_path / "5_evaluation.json")
    said = " ".join(screen_of("inspect", tmp_path / "4_schedule.json"))
    assert "evaluation is of another schedule; evaluate again" in said
    assert "50.0" not in said
