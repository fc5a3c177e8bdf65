"""Runs whose profile lost a file, got one from elsewhere, or whose data set is smaller than what was asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from schedule_finder.cli.commands import app
from schedule_finder.profiling.store import ProfileStore
from tests.support.command_line import call, runner
from tests.support.tiny_folder import write_jsonl, write_llava_folder

SAMPLES = 72  # two chunks, so two shards


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A profile of two shards."""
    folder = tmp_path_factory.mktemp("incomplete")
    found = {"checkpoint": write_llava_folder(folder / "llava"), "data": write_jsonl(folder / "data", 80)}
    found["run"] = folder / "run"
    assert profile(found, found["run"])["done"] == SAMPLES
    return found


def profile(made: dict[str, Path], out: Path, code: int = 0) -> Any:
    return call(
        "profile", made["checkpoint"], "--dataset", made["data"], "--samples", SAMPLES, "--eval-samples", 8, "--out", out,
        code=code,
    )  # fmt: skip


def test_a_missing_shard_is_refused_and_its_samples_are_done_again(
    made: dict[str, Path], tmp_path: Path
) -> None:
    out = shutil.copytree(made["run"], tmp_path / "run")
    shards = sorted((out / "2_profile").glob("part-*.parquet"))
    assert len(shards) == 2
    shards[0].unlink()
    assert "part-00000.parquet missing (64 samples)" in call("detect", out, code=2)
    assert "part-00000.parquet missing (64 samples)" in call("schedule", out, "--no-model", code=2)
    assert profile(made, out)["done"] == SAMPLES
    again, first = ProfileStore(out / "2_profile").read(), ProfileStore(made["run"] / "2_profile").read()
    assert again.ids == first.ids
    assert all((a == b).all() for a, b in zip(again.maps, first.maps, strict=True))
    call("detect", out)


def test_a_changed_shard_is_noticed(made: dict[str, Path], tmp_path: Path) -> None:
    """A whole file, but not the one that was written: another order of its rows."""
    import pyarrow.parquet as pq

    out = shutil.copytree(made["run"], tmp_path / "run")
    shard = out / "2_profile" / "part-00001.parquet"
    table = pq.read_table(shard)
    pq.write_table(table.take(list(range(len(table)))[::-1]), shard)
    assert "its checksum is not that in manifest.json" in call("detect", out, code=2)
    assert profile(made, out)["done"] == SAMPLES
    call("detect", out)


@pytest.mark.parametrize("damaged", ["manifest.json", "part-00001.parquet"])
@pytest.mark.parametrize("command", [("detect",), ("schedule", "--no-model"), ("plot",)])
def test_a_command_that_reads_a_damaged_profile_renames_nothing(
    made: dict[str, Path], tmp_path: Path, damaged: str, command: tuple[str, ...]
) -> None:
    """Whether the shard or its checksum in the manifest changed."""
    out = shutil.copytree(made["run"], tmp_path / "run")
    folder = out / "2_profile"
    if damaged == "manifest.json":
        document = json.loads((folder / damaged).read_text())
        document["shards"]["part-00001.parquet"]["sha256"] = "0" * 64
        (folder / damaged).write_text(json.dumps(document))
    else:
        (folder / damaged).write_bytes((folder / damaged).read_bytes()[:-10])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    name, *options = command
    line = call(name, out, *options, code=2)
    assert "part-00001.parquet is damaged" in line
    assert "its checksum is not that in manifest.json" in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_shard_from_elsewhere_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    out = shutil.copytree(made["run"], tmp_path / "run")
    shutil.copy(made["run"] / "2_profile" / "part-00000.parquet", out / "2_profile" / "part-00007.parquet")
    assert "part-00007.parquet is not in manifest.json" in call("detect", out, code=2)
    assert profile(made, out)["done"] == SAMPLES
    assert (out / "2_profile" / "part-00007.unlisted").exists()
    call("detect", out)


def test_the_last_shard_of_a_killed_process_counts(made: dict[str, Path], tmp_path: Path) -> None:
    """It is complete, but the process ended before it listed it."""
    out = shutil.copytree(made["run"], tmp_path / "run")
    path = out / "2_profile" / "manifest.json"
    document = json.loads(path.read_text())
    del document["shards"]["part-00001.parquet"]
    path.write_text(json.dumps(document))
    before = (out / "2_profile" / "part-00001.parquet").read_bytes()
    call("detect", out)
    assert profile(made, out)["done"] == SAMPLES
    assert (out / "2_profile" / "part-00001.parquet").read_bytes() == before
    assert not list(path.parent.glob("*.unlisted"))
    assert set(json.loads(path.read_text())["shards"]) == {"part-00000.parquet", "part-00001.parquet"}


def test_merging_needs_complete_profiles(made: dict[str, Path], tmp_path: Path) -> None:
    out = shutil.copytree(made["run"], tmp_path / "run")
    assert call("merge", out, made["run"], "--out", tmp_path / "both")["done"] == SAMPLES
    (out / "2_profile" / "part-00000.parquet").unlink()
    assert "missing (64 samples)" in call("merge", out, made["run"], "--out", tmp_path / "joined", code=2)


def test_fewer_samples_than_asked_for_are_one_notice_and_evidence(
    made: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    data = write_jsonl(tmp_path / "data", 10)
    result = runner.invoke(
        app, ["profile", *map(str, (made["checkpoint"], "--dataset", data, "--samples", 20, "--out", out))]
    )
    assert result.exit_code == 0, result.stderr
    notices = [line for line in result.stderr.splitlines() if "fewer samples" in line]
    assert notices == [
        "notice: fewer samples than asked for: 8 to profile and 2 held out (20 and 450 were asked for); the data set has "
        "no more that differ"
    ]
    call("detect", out)
    call("schedule", out, "--solver", "retained")
    counts = json.loads((out / "4_schedule.json").read_text())["evidence"]["counts"]
    assert counts == {"asked": 20, "profiled": 8, "asked_held_out": 450, "held_out": 2}
    # As many as were asked for: no notice.
    enough = runner.invoke(
        app,
        ["profile", *map(str, (made["checkpoint"], "--dataset", data, "--samples", 8, "--eval-samples", 2, "--out",
                               tmp_path / "enough"))],
    )  # fmt: skip
    assert "notice" not in enough.stderr
