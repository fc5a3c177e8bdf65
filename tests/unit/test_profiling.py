"""The profile step over an engine of planted rows: what is done, noted, stored, and when it stops."""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedule_finder import pipeline
from schedule_finder.errors import InputError
from schedule_finder.profiling.capture import CURVE_FIELDS, SCORE_FIELDS, ProfileRow
from schedule_finder.profiling.engines.base import BatchResult, Outcome, Report, SampleChunk, cut_chunks
from schedule_finder.profiling.store import ProfileStore
from schedule_finder.run.folder import Run
from schedule_finder.samples import Sample, SampleEntry, describe, read_entries, write_entries
from tests.support.stored_profiles import assert_equal, ids_of, in_memory

LAYERS, VISION = 4, 40


def planted_row(name: str) -> ProfileRow:
    """A row that its sample's id alone decides."""
    rng = np.random.default_rng(list(name.encode()))
    scores = {field: rng.random((LAYERS, VISION), np.float32) for field in SCORE_FIELDS}
    return ProfileRow(VISION, 3, 5, scores, {field: rng.random(LAYERS, np.float32) for field in CURVE_FIELDS})


class Rows:
    """A data set of so many rows, which nobody loads."""

    source = "planted"

    def __init__(self, count: int) -> None:
        self._count = count

    def size(self, use: str) -> int:
        return self._count

    def load(self, entry: SampleEntry) -> Sample:
        raise AssertionError("the engine is planted")


class PlantedEngine:
    """Gives planted rows; samples in ``bad`` are skipped; ``stop_after`` outcomes it breaks."""

    loaded = None
    place = "nowhere"

    def __init__(self, bad: Iterable[str] = (), stop_after: float = math.inf) -> None:
        self.meta: dict[str, Any] = {
            "backbone": {"name": "x", "num_layers": LAYERS},
            "layers": [*range(LAYERS)],
        }
        self.seen: list[str] = []
        self._bad = set(bad)
        self._left = stop_after

    def __enter__(self) -> PlantedEngine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def profile(self, chunks: Iterable[SampleChunk], report: Report) -> Iterator[BatchResult]:
        for chunk in chunks:
            wanted = [entry for entry in chunk.entries if entry.id in chunk.wanted]
            for first in range(0, len(wanted), 32):
                some = wanted[first : first + 32]
                self._left -= len(some)
                if self._left < 0:
                    raise KeyboardInterrupt
                self.seen += [entry.id for entry in some]
                yield BatchResult([self._outcome(entry) for entry in some])
            yield BatchResult(last=True)

    def _outcome(self, entry: SampleEntry) -> Outcome:
        sample = Sample(entry.id, (), f"what is {entry.id}?", "a dog")
        entry = describe(entry, sample)
        if entry.id in self._bad:
            return Outcome(SampleEntry(**{**vars(entry), "status": "skipped", "reason": "it is planted"}))
        return Outcome(SampleEntry(**{**vars(entry), "status": "done"}), planted_row(entry.id))


def begin(folder: Path, samples: int) -> Run:
    return Run.begin(folder, "test", {"samples": samples, "eval_samples": 2, "seed": 0})


def profile(run: Run, engine: PlantedEngine, rows: int = 1000, **options: Any) -> dict[str, Any]:
    report = options.pop("report", lambda line: pytest.fail(line))
    return pipeline.profile_step(run, engine, Rows(rows), lambda done, total: None, report=report, **options)  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 300), st.sets(st.integers(0, 299)), st.integers(1, 70))
def test_windows_do_not_depend_on_what_is_pending(count: int, pending: set[int], size: int) -> None:
    entries = [SampleEntry(str(i), "x", i, "calibration") for i in range(count)]
    everything = cut_chunks(entries, frozenset(entry.id for entry in entries), size)
    assert [entry for chunk in everything for entry in chunk.entries] == entries
    names = frozenset(str(i) for i in pending if i < count)
    some = cut_chunks(entries, names, size)
    assert frozenset[str]().union(*(chunk.wanted for chunk in some)) == names
    by_number = {chunk.number: chunk.entries for chunk in everything}
    assert all(chunk.wanted and chunk.entries == by_number[chunk.number] for chunk in some)


def test_an_interrupted_step_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = begin(tmp_path / "whole", 300)
    profile(whole, PlantedEngine())
    run = begin(tmp_path / "run", 300)
    first = PlantedEngine(stop_after=140)
    with pytest.raises(KeyboardInterrupt):
        profile(run, first)
    assert json.loads(run.path.read_text())["steps"]["profile"]["state"] == "failed"
    second = PlantedEngine()
    assert profile(run, second) == {"done": 300, "skipped": 0}
    assert first.seen + second.seen == ids_of(run)
    assert_equal(run.profile.read(), whole.profile.read())
    assert run.samples.read_text() == whole.samples.read_text()
    third = PlantedEngine()
    profile(run, third)
    assert third.seen == []


def test_what_is_noted_but_not_stored_is_done_again(tmp_path: Path) -> None:
    run = begin(tmp_path, 200)
    profile(run, PlantedEngine())
    before = in_memory(run.profile.read())
    lost = sorted(run.profile.folder.glob("part-*"))[1]
    missing = set(run.profile.ids())
    lost.unlink()
    missing -= set(run.profile.ids())
    again = PlantedEngine()
    said: list[str] = []
    profile(run, again, report=said.append)
    assert [f"{lost.name} is missing" in line for line in said] == [True]
    assert set(again.seen) == missing
    assert_equal(run.profile.read(), before)


@pytest.mark.parametrize("damage", ["cut", "one bit", "empty"])
def test_a_damaged_shard_is_set_aside_and_done_again(tmp_path: Path, damage: str) -> None:
    run = begin(tmp_path, 200)
    profile(run, PlantedEngine())
    before = in_memory(run.profile.read())
    shard = run.profile.folder / "part-00001.parquet"
    content = bytearray(shard.read_bytes())
    if damage == "one bit":
        content[len(content) // 2] ^= 8
    shard.write_bytes({"cut": content[: len(content) // 2], "one bit": content, "empty": b""}[damage])
    lines: list[str] = []
    again = PlantedEngine()
    profile(run, again, report=lines.append)
    (line,) = lines
    assert "part-00001.parquet is damaged" in line
    assert "set aside as part-00001.corrupt" in line
    assert (run.profile.folder / "part-00001.corrupt").exists()
    assert len(again.seen) == 64
    assert_equal(run.profile.read(), before)


def test_a_note_that_was_cut_off_is_a_sample_done_again(tmp_path: Path) -> None:
    run = begin(tmp_path, 200)
    with pytest.raises(KeyboardInterrupt):
        profile(run, PlantedEngine(stop_after=100))
    notes = run.samples.with_name("1_samples.jsonl.updates")
    notes.write_text(notes.read_text()[:-40])
    assert [entry.status for entry in read_entries(run.samples)].count("done") == 95
    assert profile(run, PlantedEngine()) == {"done": 200, "skipped": 0}
    assert run.profile.read().ids == sorted(ids_of(run))
    assert len(run.profile.ids()) == 200
    assert not notes.exists()


def test_skipped_samples_are_not_tried_again(tmp_path: Path) -> None:
    run = begin(tmp_path, 200)
    bad = set(_chosen(run)[::40])
    assert profile(run, PlantedEngine(bad)) == {"done": 200 - len(bad), "skipped": len(bad)}
    again = PlantedEngine()
    profile(run, again)
    assert again.seen == []
    skipped = [entry for entry in read_entries(run.samples) if entry.status == "skipped"]
    assert {entry.id for entry in skipped} == bad
    assert {entry.reason for entry in skipped} == {"it is planted"}


def _chosen(run: Run) -> list[str]:
    write_entries(run.samples, pipeline.choose_samples(Rows(1000), 200, 2, 0))  # type: ignore[arg-type]
    return ids_of(run)


def test_too_many_skipped_stop_the_run_until_more_are_allowed(tmp_path: Path) -> None:
    run = begin(tmp_path, 200)
    bad = _chosen(run)[:64:8]
    engine = PlantedEngine(bad)
    with pytest.raises(
        InputError, match=r"8 of 64 samples cannot be used, more than 5%.*it is planted.*--max-skipped"
    ):
        profile(run, engine)
    assert len(engine.seen) == 64
    assert len(run.profile.ids()) == 56
    again = PlantedEngine()
    with pytest.raises(InputError, match="8 of 64"):
        profile(run, again)
    assert again.seen == []
    assert profile(run, again, max_skipped=0.2) == {"done": 192, "skipped": 8}


def test_the_hook_sees_whole_windows_and_ends_the_step(tmp_path: Path) -> None:
    run = begin(tmp_path, 300)
    sizes: list[int] = []

    def enough(store: ProfileStore) -> bool:
        sizes.append(len(store.ids()))
        return len(sizes) == 4

    assert profile(run, PlantedEngine(), after_shard=enough) == {"done": 192, "skipped": 0}
    assert sizes == [0, 64, 128, 192]
    assert json.loads(run.path.read_text())["steps"]["profile"]["state"] == "done"


def test_a_disk_that_fills_loses_nothing_that_was_done(tmp_path: Path) -> None:
    """The system refuses files beyond a size, which the list of samples is below and shards are above."""
    run = begin(tmp_path, 200)
    with pytest.raises(KeyboardInterrupt):
        profile(run, PlantedEngine(stop_after=64))
    kept = run.profile.ids()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (45_000, limit[1]))
    try:
        with pytest.raises(InputError, match=r"2_profile.*cannot be written \(File too large\).*kept"):
            profile(run, PlantedEngine())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert run.profile.ids() == kept
    assert not list(run.profile.folder.glob("*.partial"))
    assert profile(run, PlantedEngine()) == {"done": 200, "skipped": 0}
    assert run.profile.read().ids == sorted(ids_of(run))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"run\.json: cannot be written \(Not a directory\)"):
        begin(tmp_path / "file" / "run", 10)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", 100)
    run.folder.chmod(0o500)
    with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"):
        profile(run, PlantedEngine())


def _resident_megabytes() -> float:
    (line,) = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")
    ]
    return int(line.split()[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_is_flat_over_100_000_samples(tmp_path: Path) -> None:
    run = begin(tmp_path, 100_000)
    sizes: list[float] = []

    def measure(store: ProfileStore) -> bool:
        sizes.append(_resident_megabytes())
        return False

    profile(run, PlantedEngine(), rows=200_000, after_shard=measure)
    tenth = len(sizes) // 10
    assert len(sizes) == 1 + -(-100_000 // 64)  # once before the first chunk
    # The list of samples itself, questions and answers, is what may grow: half a kilobyte each.
    assert np.median(sizes[-tenth:]) - np.median(sizes[tenth : 2 * tenth]) < 50
