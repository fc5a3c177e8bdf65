"""Runs of separate jobs become one that every later step works on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from schedule_finder.profiling.store import ProfileStore
from schedule_finder.run.folder import Run
from schedule_finder.samples import read_entries
from tests.support.command_line import call
from tests.support.tiny_folder import write_jsonl, write_llava_folder

SAMPLES = 20


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three jobs on one data set whose choices of samples overlap."""
    folder = tmp_path_factory.mktemp("jobs")
    checkpoint = write_llava_folder(folder / "llava")
    data = write_jsonl(folder / "data", 40)
    (data.parent / "images" / "3.png").write_text("not an image")
    runs = [folder / f"job{seed}" for seed in range(3)]
    for seed, out in enumerate(runs):
        call(
            "profile", checkpoint, "--dataset", data, "--samples", SAMPLES, "--eval-samples", 8, "--seed", seed,
            "--out", out, "--max-skipped", "50%",
        )  # fmt: skip
    return runs


def ids(run: Path, use: str, status: str) -> set[str]:
    return {e.id for e in read_entries(Run(run).samples) if e.use == use and e.status == status}


def test_all_samples_are_there_once_and_every_later_step_works(jobs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "all"
    found = call("merge", *jobs, "--out", out)
    done = [ids(run, "calibration", "done") for run in jobs]
    assert len(done[0] | done[1] | done[2]) < sum(map(len, done))
    stored = Run(out).profile.ids()
    assert len(stored) == len(set(stored)) == found["done"]
    assert set(stored) == done[0] | done[1] | done[2] == ids(out, "calibration", "done")
    assert found["pending"] == 0
    assert found["skipped"] == len(ids(out, "calibration", "skipped")) <= 1
    # What anybody discovered on is not judged on.
    tried = set().union(*(ids(run, "calibration", status) for run in jobs for status in ("done", "skipped")))
    held_out = ids(jobs[0], "held_out", "pending")
    assert held_out & tried
    assert ids(out, "held_out", "pending") == held_out - tried
    options = json.loads((out / "run.json").read_text())["options"]
    assert options["samples"] == len(stored) + found["skipped"]
    assert options["eval_samples"] == len(held_out - tried)

    first, merged = Run(jobs[0]).profile.read(), Run(out).profile.read()
    place = merged.ids.index(first.ids[5])
    assert (merged.maps[place] == first.maps[5]).all()
    call("detect", out)
    call("schedule", out, "--solver", "retained")
    call("evaluate", out, "--max-new-tokens", 2)


def test_what_does_not_belong_together_is_refused(jobs: list[Path], tmp_path: Path) -> None:
    other = shutil.copytree(jobs[1], tmp_path / "other")
    meta = json.loads((other / "2_profile" / "meta.json").read_text())
    for name, value in (
        ("dtype", "bfloat16"),
        ("prompt_digest", "sha256:0"),
        ("backbone", meta["backbone"] | {"name": "x"}),
    ):
        (other / "2_profile" / "meta.json").write_text(json.dumps({**meta, name: value}))
        assert f"another {name}" in call("merge", jobs[0], other, "--out", tmp_path / name, code=2)
        assert not list((tmp_path / name).rglob("part-*"))
        assert not (tmp_path / name / "run.json").exists()
    (other / "2_profile" / "meta.json").write_text(json.dumps(meta))
    run = json.loads((other / "run.json").read_text())
    run["options"]["dataset"] = "pope"
    (other / "run.json").write_text(json.dumps(run))
    assert "another dataset" in call("merge", jobs[0], other, "--out", tmp_path / "out", code=2)
    assert "holds a run" in call("merge", jobs[0], jobs[1], "--out", other, code=2)
    assert "no run here" in call("merge", jobs[0], tmp_path, "--out", tmp_path / "out", code=2)


def test_an_interrupted_merge_is_completed(jobs: list[Path], tmp_path: Path) -> None:
    call("merge", *jobs, "--out", tmp_path / "whole")
    half = tmp_path / "half"
    ProfileStore(half / "2_profile").merge([Run(jobs[0]).profile])
    call("merge", *jobs, "--out", half)
    assert sorted(Run(half).profile.ids()) == sorted(Run(tmp_path / "whole").profile.ids())


def test_a_merged_run_goes_on(jobs: list[Path], tmp_path: Path) -> None:
    """Samples that no job had done are done by the next `profile`."""
    cut = shutil.copytree(jobs[1], tmp_path / "cut")
    (lost,) = (cut / "2_profile").glob("part-*")
    lost.unlink()
    # With a manifest, the missing shard is refused; a profile of an earlier release has none.
    (cut / "2_profile" / "manifest.json").unlink()
    found = call("merge", jobs[0], cut, "--out", tmp_path / "both")
    assert found["pending"] > 0
    options = json.loads((tmp_path / "both" / "run.json").read_text())["options"]
    again = call(
        "profile", options["backbone"], "--dataset", options["dataset"], "--samples", options["samples"],
        "--eval-samples", options["eval_samples"], "--out", tmp_path / "both", "--max-skipped", "50%",
    )  # fmt: skip
    assert again["done"] == found["done"] + found["pending"]
