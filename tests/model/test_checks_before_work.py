"""`run` refuses before its first long step what would fail later, and `--dry-run` counts the work and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from schedule_finder.profiling.engines.local import LocalEngine
from schedule_finder.samples import read_entries
from tests.support.command_line import call
from tests.support.tiny_folder import write_jsonl, write_llava_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """The command on a checkpoint and a data file, without options."""
    folder = tmp_path_factory.mktemp("before-work")
    data = write_jsonl(folder / "data", 20)
    return (
        "run",
        write_llava_folder(folder / "llava"),
        "--dataset",
        data,
        "--samples",
        12,
        "--eval-samples",
        4,
    )


@pytest.fixture
def no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a sample would be profiled."""

    def profile(*_: object) -> None:
        raise AssertionError("the profile began")

    monkeypatch.setattr(LocalEngine, "profile", profile)


@pytest.mark.usefixtures("no_profile")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--solver", "magic"), "--solver 'magic': choose sensitivity"),
        (("--scorer", "magic"), "--scorer 'magic': choose auto, text_guided"),
        (("--scorer", "random", "--solver", "retained"), "--scorer 'random': choose auto, uniform_text"),
        (("--detector", "eye"), "--detector 'eye': choose attention_shift"),
        (("--dropped-tokens", "burn"), "--dropped-tokens 'burn': choose auto"),
        (("--baselines", "random,best"), "--baselines 'best': choose all, none"),
        (("--samples", "9" * 400), "must be a whole number from 2 to 10000000, or auto"),
        (("--eval-samples", "9" * 400), "should be less than or equal to 10000000"),
        (("--budget", "1%"), "budget 0.01 (processed) is out of reach"),
        (("--budget", "10%", "--solver", "paper"), "scoring needs the first layer whole, which costs 0.167"),
        (("--budget", "5%", "--budget-kind", "flops"), "budget 0.05 (flops) is out of reach"),
        (("--budget", "10%", "--budget-kind", "kv", "--solver", "paper"), "budget 0.1 (kv) is out of reach"),
    ],
)
def test_bad_options_are_refused_before_the_profile(
    made: tuple[Any, ...], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in call(*made, "--out", tmp_path / "run", *options, code=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_profile")
def test_an_output_folder_that_cannot_be_made_is_refused_first(made: tuple[Any, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = call("run", "no-such-backbone", *made[2:], "--out", tmp_path / "file" / "run", code=2)
    assert f"{tmp_path / 'file'} is a file, not a folder" in line


@pytest.mark.usefixtures("no_profile")
def test_missing_held_out_images_are_refused_before_the_profile(
    made: tuple[Any, ...], tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "data", 20)
    asked = ("run", made[1], "--dataset", data, "--samples", 16, "--out", tmp_path / "run")
    for row in range(20):
        (data.parent / "images" / f"{row}.png").unlink()
    line = call(*asked, "--eval-samples", 4, code=2)
    assert "4 of 4 held-out samples cannot be used" in line
    assert ".png" in line
    assert not (tmp_path / "run").exists()


def test_held_out_samples_may_be_missing_where_the_user_says_so(
    made: tuple[Any, ...], tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "data", 20)
    for row in (3, 7, 12):
        (data.parent / "images" / f"{row}.png").unlink()
    asked = ("run", made[1], "--dataset", data, "--samples", 10, "--eval-samples", 10, "--solver", "retained")
    options = ("--baselines", "none", "--max-new-tokens", 1, "--out", tmp_path / "run")
    call(*asked, *options, "--max-skipped", "60%")
    table = pd.read_csv(tmp_path / "run" / "5_evaluation.csv")
    entries = read_entries(tmp_path / "run" / "1_samples.jsonl")
    missing = sum(entry.use == "held_out" and entry.status == "skipped" for entry in entries)
    assert missing > 0
    assert table.n.max() == 10 - missing
    line = call("evaluate", tmp_path / "run", "--baselines", "none", "--max-new-tokens", 2, code=2)
    assert "--max-skipped allows more" in line


def test_a_later_command_says_where_relative_paths_begin(
    made: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, elsewhere = tmp_path / "begun", tmp_path / "elsewhere"
    write_jsonl(begun / "data", 20)
    elsewhere.mkdir()
    monkeypatch.chdir(begun)
    call(
        "profile",
        made[1],
        "--dataset",
        "data/data.jsonl",
        "--samples",
        12,
        "--eval-samples",
        4,
        "--out",
        "run",
    )
    call("detect", "run")
    call("schedule", "run", "--solver", "retained")
    monkeypatch.chdir(elsewhere)
    line = call("evaluate", begun / "run", "--baselines", "none", code=2)
    assert "data/data.jsonl" in line
    assert f"(the run was begun in {begun}; run this command there" in line
    monkeypatch.chdir(begun)
    call("evaluate", "run", "--baselines", "none", "--max-new-tokens", 1)


def test_a_budget_that_can_be_met_passes_the_check(made: tuple[Any, ...], tmp_path: Path) -> None:
    """The bound is that of the search: what it finds is not refused."""
    out = tmp_path / "run"
    found = call(*made, "--out", out, "--budget", "20%", "--solver", "paper", "--baselines", "none")
    assert found["numbers"]["schedule"]["budget"]["processed"] == pytest.approx(0.2, rel=0.01)


@pytest.mark.usefixtures("no_profile")
def test_a_dry_run_counts_the_work_and_writes_nothing(made: tuple[Any, ...], tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = (*made, "--out", out, "--batch-size", 4, "--max-new-tokens", 2, "--dry-run")
    plan = call(*asked, "--baselines", "random,random-layers")
    assert plan["samples"] == {"calibration": 12, "profile": 12, "held_out": 4}
    assert plan["tokens_per_sample"]["vision"] == {"mean": 16.0, "min": 16, "max": 16}
    assert plan["tokens_per_sample"]["other"]["min"] >= 5
    assert plan["forwards"]["profile"] == 12
    assert (plan["methods"], plan["generations"]) == (8, 32)
    assert plan["timed"] == {"samples": 8, "batches": 2}
    assert plan["memory"]["weights_bytes"] == weights_in(made[1])
    assert plan["memory"]["peak_bytes"] > plan["memory"]["weights_bytes"]
    assert all(seconds > 0 for seconds in plan["seconds"].values())
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []

    cheap = call(*asked, "--solver", "paper", "--eval-samples", 0)
    assert (cheap["forwards"]["search"], cheap["generations"]) == (0, 0)
    assert call(*asked, "--solver", "grid")["forwards"]["search"] is None


def weights_in(folder: Path) -> int:
    """Bytes of the weights in a checkpoint: its file without the header."""
    (path,) = folder.glob("*.safetensors")
    return path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")


def test_the_search_needs_no_more_forward_passes_than_a_dry_run_says(
    made: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from schedule_finder.measuring.answer_kl import AnswerKL

    used: list[AnswerKL] = []
    make = AnswerKL.for_samples.__func__  # type: ignore[attr-defined]

    def remember(cls: type[AnswerKL], *arguments: Any) -> AnswerKL:
        used.append(make(cls, *arguments))
        return used[-1]

    monkeypatch.setattr(AnswerKL, "for_samples", classmethod(remember))
    most = call(*made, "--out", tmp_path / "run", "--dry-run")["forwards"]["search"]
    call(*made, "--out", tmp_path / "run", "--eval-samples", 0)
    took = sum(one.forwards for one in used)
    assert 0.1 * most < took <= most
