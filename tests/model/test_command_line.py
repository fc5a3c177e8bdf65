"""The commands on a folder and a data set made elsewhere, and every way to get them wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from pruning_runtime import Schedule
from pruning_runtime.scorers import SCORERS
from schedule_finder.evaluation.outcomes import COLUMNS
from schedule_finder.evidence import HeldOutSummary, digest
from tests.support.command_line import call
from tests.support.tiny_folder import write_jsonl, write_llava_folder

RUN_FILES = [
    "1_samples.jsonl",
    "2_profile",
    "3_change_points.json",
    "4_schedule.json",
    "5_evaluation.csv",
    "6_figures",
    "run.json",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, a data file, and a finished run on them."""
    folder = tmp_path_factory.mktemp("elsewhere")
    checkpoint = write_llava_folder(folder / "llava")
    data = write_jsonl(folder / "data", 30)
    out = folder / "run"
    call(
        "run", checkpoint, "--dataset", data, "--samples", 24, "--out", out, "--batch-size", 8,
        "--max-new-tokens", 2, "--baselines", "all",
    )  # fmt: skip
    return {"checkpoint": checkpoint, "data": data, "run": out}


def test_run_writes_every_numbered_file(made: dict[str, Path]) -> None:
    out = made["run"]
    assert set(RUN_FILES) <= {path.name for path in out.iterdir()}
    steps = json.loads((out / "run.json").read_text())["steps"]
    assert list(steps) == ["profile", "detect", "schedule", "evaluate", "viewer", "plot"]
    assert {step["state"] for step in steps.values()} == {"done"}
    schedule = Schedule.load(out / "4_schedule.json")
    assert schedule.budget.processed == pytest.approx(0.35, rel=0.01)
    assert schedule.evidence["samples"] == 24
    summary = HeldOutSummary.load(out / "5_evaluation.json")
    assert summary is not None
    assert (summary.schedule, summary.methods["full"].n) == (digest(schedule), 6)
    table = pd.read_csv(out / "5_evaluation.csv")
    assert list(table.columns) == list(COLUMNS)
    # The schedule's own scorer is no baseline, and rules that a stage or a prompt does not allow are left out.
    assert {"full", "schedule", "paper", "pyramid", "random layers"} <= set(table.method)
    assert len(set(SCORERS) & set(table.method)) >= len(SCORERS) - 5
    full = table[table.method == "full"].iloc[0]
    assert (full.agreement, full.kl, full.processed) == (1.0, 0.0, 1.0)
    pruned_rows = table[table.method != "full"]
    assert (pruned_rows.kv_bytes < full.kv_bytes).all()
    same_stages = pruned_rows[~pruned_rows.method.str.contains("layers|paper|pyramid")]
    assert same_stages.published.nunique() == 1
    assert pruned_rows.processed.tolist() == pytest.approx([0.35] * len(pruned_rows), abs=0.5 / 16)
    assert any((out / "6_figures").glob("*.png"))


def test_discovery_and_evaluation_share_no_sample(made: dict[str, Path]) -> None:
    lines = [json.loads(line) for line in (made["run"] / "1_samples.jsonl").read_text().splitlines()]
    assert all(line["status"] == "done" for line in lines)
    uses = {use: {line["row"] for line in lines if line["use"] == use} for use in ("calibration", "held_out")}
    assert len(uses["calibration"]) == 24
    assert len(uses["held_out"]) == 6
    assert not uses["calibration"] & uses["held_out"]


@pytest.mark.parametrize("command", ["detect", "schedule", "evaluate", "plot"])
def test_every_step_runs_again_alone(made: dict[str, Path], tmp_path: Path, command: str) -> None:
    out = shutil.copytree(made["run"], tmp_path / "run")
    product = {
        "detect": "3_change_points.json",
        "schedule": "4_schedule.json",
        "evaluate": "5_evaluation.csv",
        "plot": "6_figures",
    }[command]
    before = out / product
    if before.is_dir():
        shutil.rmtree(before)
    else:
        before.unlink()
    options = ["--max-new-tokens", 2] if command == "evaluate" else []
    call(command, out, *options)
    assert before.exists()


def test_another_budget_needs_no_model(made: dict[str, Path], tmp_path: Path) -> None:
    out = shutil.copytree(made["run"], tmp_path / "run")
    for budget, kind in (("30%", "processed"), ("0.35", "published"), ("60%", "flops")):
        found = call("schedule", out, "--budget", budget, "--budget-kind", kind)
        wanted = float(budget.rstrip("%")) / (100 if budget.endswith("%") else 1)
        assert found["budget"][kind] == pytest.approx(wanted, rel=0.01)
        assert Schedule.load(out / "4_schedule.json").budget.kind == kind


def test_a_run_resumes_where_it_stopped(made: dict[str, Path], tmp_path: Path) -> None:
    out = shutil.copytree(made["run"], tmp_path / "run")
    profile = out / "2_profile"
    shards = sorted(profile.glob("part-*.parquet"))
    shards[-1].unlink()
    result = call("profile", made["checkpoint"], "--dataset", made["data"], "--samples", 24, "--out", out)
    assert result["done"] == 24
    from schedule_finder.profiling.store import ProfileStore

    again, first = ProfileStore(profile).read(), ProfileStore(made["run"] / "2_profile").read()
    assert again.ids == first.ids


def test_inspect(made: dict[str, Path]) -> None:
    assert call("inspect", made["run"])["format"] == "adaptinfer-run"
    assert call("inspect", made["run"] / "4_schedule.json")["format"] == "adaptinfer-schedule"
    assert call("inspect", "adaptinfer/llava-1.5-7b-64")["backbone"]["num_layers"] == 32
    facts = call("inspect", made["checkpoint"])
    assert facts["class"] == "LlavaForConditionalGeneration"
    assert facts["vision_token_ids"] == [100]


def test_bad_input_is_one_line_and_code_2(made: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, data, out = made["checkpoint"], made["data"], tmp_path / "out"
    on_data = ("--dataset", data, "--samples", 8, "--out", out)
    assert "no config.json" in call("run", tmp_path, *on_data, code=2)
    assert "does not load" in call("run", "nobody/no-such-model", *on_data, code=2)
    assert "needs --dataset" in call("run", checkpoint, code=2)
    assert "no such file" in call("run", checkpoint, "--dataset", tmp_path / "none.jsonl", code=2)
    assert "--image-column 'photo'" in call("run", checkpoint, *on_data, "--image-column", "photo", code=2)
    assert "--budget 150%" in call("run", checkpoint, *on_data, "--budget", "150%", code=2)
    assert "is not a number" in call("run", checkpoint, *on_data, "--budget", "lots", code=2)
    assert "need --budget-kind latency" in call("run", checkpoint, *on_data, "--budget", "5ms", code=2)
    assert "--budget-kind" in call("run", checkpoint, *on_data, "--budget-kind", "money", code=2)
    assert "--dtype 'int3'" in call("run", checkpoint, *on_data, "--dtype", "int3", code=2)
    assert "--device 'abacus'" in call("run", checkpoint, *on_data, "--device", "abacus", code=2)
    assert not out.exists()
    assert "no run here" in call("detect", tmp_path, code=2)


def test_bad_input_later_on_loses_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    out = shutil.copytree(made["run"], tmp_path / "run")
    before = (out / "4_schedule.json").read_text()
    assert "out of reach" in call("schedule", out, "--budget", "1%", "--scorer", "text_guided", code=2)
    assert "choose sensitivity, retained" in call("schedule", out, "--solver", "magic", code=2)
    assert "--scorer 'magic': choose auto," in call("schedule", out, "--scorer", "magic", code=2)
    assert "--detector" in call("detect", out, "--detector", "eye", code=2)
    assert (out / "4_schedule.json").read_text() == before
    assert "another samples" in call(
        "profile", made["checkpoint"], "--dataset", made["data"], "--out", out, code=2
    )

    (out / "4_schedule.json").write_text(before[:300])
    assert "not a complete JSON" in call("evaluate", out, code=2)
    (out / "4_schedule.json").write_text(before.replace('"num_layers": 6', '"num_layers": 7'))
    assert "num_layers is 6, the schedule was made for 7" in call("evaluate", out, code=2)
    (out / "3_change_points.json").write_text("{")
    assert "detect again" in call("schedule", out, code=2)
    (out / "3_change_points.json").unlink()
    assert "run `adaptinfer-profile detect" in call("schedule", out, code=2)


def test_unusable_samples_are_skipped_listed_and_limited(made: dict[str, Path], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data", 42)
    (data.parent / "images" / "3.png").write_text("not an image")
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lines[7]["question"] = ""
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "run"
    arguments = ("profile", made["checkpoint"], "--dataset", data, "--samples", 41, "--eval-samples", 1)
    result = call(*arguments, "--out", out, "--seed", 1)
    assert result["skipped"] == 2
    assert result["done"] == 39
    skipped = [json.loads(line) for line in (out / "1_samples.jsonl").read_text().splitlines()]
    reasons = {line["row"]: line["reason"] for line in skipped if line["status"] == "skipped"}
    assert "cannot be read" in reasons[3]
    assert "question is empty" in reasons[7]

    for row in range(10, 20):
        (data.parent / "images" / f"{row}.png").unlink()
    message = call(*arguments, "--out", tmp_path / "worse", code=2)
    assert "samples cannot be used, more than 5%" in message
    assert "does not exist" in message
    assert (tmp_path / "worse" / "1_samples.jsonl").exists()


def test_the_overlays_example_is_kept_for_square_images_only(made: dict[str, Path]) -> None:
    """A processor crops or pads other images, so where a token lies in them is not known."""
    assert not (made["run"] / "5_example.json").exists()  # the fixture's images are 24 x 20
