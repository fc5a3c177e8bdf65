"""Profiles on disk: what goes in comes out; shards resume, merge, and survive damage."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from schedule_finder.change_points import DETECTORS, distances, get_detector
from schedule_finder.change_points.distances import layer_distances
from schedule_finder.profiling import manifest
from schedule_finder.profiling.capture import CURVE_FIELDS, SCORE_FIELDS, ProfileRow
from schedule_finder.profiling.store import ProfileStore, StoreError
from schedule_finder.profiling.stored_scores import StoredScores, chosen
from schedule_finder.signals import layer_shift, spread

LAYERS = 5
ID_BYTES = 500
"""Python objects of one sample's id and place, at most."""
VERSION_1 = Path(__file__).parents[1] / "data" / "profile_v1"
META = {"backbone": {"name": "x", "num_layers": LAYERS}, "layers": list(range(LAYERS)), "dtype": "float32"}


def rows_of(count: int, seed: int = 0, most: int = 40) -> list[ProfileRow]:
    """Rows with different numbers of vision tokens and values over eight orders of magnitude."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        vision = int(rng.integers(1, most))
        rows.append(
            ProfileRow(
                num_vision=vision,
                num_text_queries=int(rng.integers(1, 9)),
                num_other=int(rng.integers(9, 20)),
                scores={
                    name: np.exp(rng.uniform(-18, 0, (LAYERS, vision))).astype(np.float32)
                    for name in SCORE_FIELDS
                },
                curves={name: rng.random(LAYERS).astype(np.float32) for name in CURVE_FIELDS},
            )
        )
    return rows


def store_with(folder: Path, names: list[str], rows: list[ProfileRow], shard: int = 4) -> ProfileStore:
    store = ProfileStore(folder)
    store.open(META)
    for first in range(0, len(rows), shard):
        store.append(names[first : first + shard], rows[first : first + shard])
    return store


def test_round_trip(tmp_path: Path) -> None:
    rows = rows_of(10)
    names = [f"s{i}" for i in (5, 3, 9, 0, 1, 2, 4, 6, 7, 8)]
    profile = store_with(tmp_path, names, rows).read()
    assert profile.ids == sorted(names)
    by_name = dict(zip(names, rows, strict=True))
    for place, name in enumerate(profile.ids):
        row = by_name[name]
        for count in ("num_vision", "num_text_queries", "num_other"):
            assert profile.counts[count][place] == getattr(row, count)
        for field in SCORE_FIELDS:
            found, expected = profile.scores[field][place], row.scores[field]
            assert found.shape == expected.shape
            # Half precision relative to the layer's largest value.
            largest = expected.max(1, keepdims=True)
            assert (np.abs(found - expected) <= expected * 2**-10 + largest * 2**-24).all()
        for field in CURVE_FIELDS:
            np.testing.assert_array_equal(profile.curves[field][place], row.curves[field])


@pytest.mark.parametrize("names", [range(9), (5, 0, 7, 2, 8, 1, 6, 3, 4), (0, 1, 2, 3, 1, 4, 5, 6, 7)])
def test_a_stream_is_what_read_returns(tmp_path: Path, names: Sequence[int]) -> None:
    """Shards in order, interleaved, and with a sample twice."""
    store = store_with(tmp_path, [f"{i}" for i in names], rows_of(9), shard=3)
    profile = store.read()
    for field in SCORE_FIELDS:
        streamed = list(store.scores(field))
        assert len(streamed) == len(profile)
        for found, expected in zip(streamed, profile.scores[field], strict=True):
            np.testing.assert_array_equal(found, expected)
    for field in CURVE_FIELDS:
        np.testing.assert_array_equal(store.curve(field), profile.curves[field])


@pytest.mark.parametrize("names", [range(9), (5, 0, 7, 2, 8, 1, 6, 3, 4), (0, 1, 2, 3, 1, 4, 5, 6, 7)])
def test_scores_in_any_order_and_by_index_are_those_of_a_scan(tmp_path: Path, names: Sequence[int]) -> None:
    store = store_with(tmp_path, [f"{i}" for i in names], rows_of(9), shard=3)
    scores = store.scores(SCORE_FIELDS[1])
    scanned = list(scores)
    whole = dict(scores.in_any_order())
    part = [scanned[3], scanned[0], scanned[4]]
    assert sorted(whole) == [*range(len(scanned))]
    for place, sample in enumerate(scanned):
        np.testing.assert_array_equal(whole[place], sample)
        np.testing.assert_array_equal(scores[place], sample)
    for found, expected in zip(scores[1::2], scanned[1::2], strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(chosen(scores, [3, 0, 4]), part, strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(store.read().subset([3, 0, 4]).scores[SCORE_FIELDS[1]], part, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_scan_holds_one_shard(tmp_path: Path, shuffled: bool) -> None:
    """Twenty shards: NumPy's peak is below a third of what all samples take, whatever the order of ids."""
    rows = rows_of(400, seed=1, most=600)  # the samples take far more than their names
    order = np.random.default_rng(0).permutation(400) if shuffled else np.arange(400)
    store = store_with(tmp_path, [f"{i:03d}" for i in order], rows, shard=20)
    everything = sum(sample.nbytes for sample in store.scores(SCORE_FIELDS[0]))
    profile = store.read()
    scans: list[Callable[[], object]] = [
        lambda: [None for _ in store.scores(SCORE_FIELDS[0]).in_any_order()],
        lambda: layer_distances(store.scores(SCORE_FIELDS[0])),
        lambda: layer_shift(profile.maps),
        lambda: profile.subset(range(0, 400, 40)),
    ]
    if not shuffled:
        scans.append(lambda: [None for _ in store.scores(SCORE_FIELDS[0])])
    for scan in scans:
        tracemalloc.start()
        try:
            scan()
            assert tracemalloc.get_traced_memory()[1] < everything / 3 + 400 * ID_BYTES
        finally:
            tracemalloc.stop()


def test_detection_on_stored_scores_is_that_in_memory(tmp_path: Path) -> None:
    rows = rows_of(40, seed=3)
    order = np.random.default_rng(1).permutation(40)
    store = store_with(tmp_path, [f"{i:02d}" for i in order], rows)
    scores = store.scores(SCORE_FIELDS[0])
    found, expected = layer_distances(scores), layer_distances(list(scores))
    np.testing.assert_array_equal(found.pairs, expected.pairs)
    np.testing.assert_array_equal(found.to_uniform, expected.to_uniform)
    np.testing.assert_array_equal(layer_shift(scores), layer_shift(list(scores)))
    for name in DETECTORS:
        detector = get_detector(name)
        assert detector.detect(scores).to_json() == detector.detect(list(scores)).to_json()


def test_of_many_samples_whole_shards_are_read_evenly_spread(tmp_path: Path, monkeypatch: Any) -> None:
    order = np.random.default_rng(1).permutation(40)
    store = store_with(tmp_path, [f"{i:02d}" for i in order], rows_of(40))
    scores = store.scores(SCORE_FIELDS[0])
    assert spread(scores, 40) is scores
    assert len(spread(scores, 1)) == 4
    some = spread(scores, 13)
    expected = sorted([*range(4), *range(16, 20), *range(36, 40)], key=lambda row: order[row])
    assert isinstance(some, StoredScores)
    assert [(int(path.stem[-1]) * 4 + row) for path, row in some._places] == expected
    # A detector says how many it read.
    monkeypatch.setattr(distances, "ALWAYS_READ", 13)
    monkeypatch.setattr(distances, "MOST_PAIRS", 0)
    detected = get_detector("attention_shift").detect(scores)
    assert detected.to_json() == get_detector("attention_shift").detect(list(some)).to_json()
    assert detected.to_json()["evidence"]["num_samples"] == 12


def test_a_checksum_is_computed_once_and_again_after_a_change(tmp_path: Path, monkeypatch: Any) -> None:
    store = store_with(tmp_path, ["a", "b"], rows_of(2), shard=1)
    computed: list[Path] = []
    own = manifest._checksum
    monkeypatch.setattr(manifest, "_checksum", lambda path: computed.append(path) or own(path))
    store.read()
    list(store.scores(SCORE_FIELDS[0]))
    assert len(computed) == 2
    # A whole shard in the place of another one: only the manifest tells them apart.
    (tmp_path / "part-00000.parquet").write_bytes((tmp_path / "part-00001.parquet").read_bytes())
    with pytest.raises(StoreError, match="part-00000"):
        store.read()


def test_shards_may_be_read_in_any_order(tmp_path: Path) -> None:
    rows, names = rows_of(9), [f"{i}" for i in range(9)]
    one = store_with(tmp_path / "a", names, rows).read()
    other = store_with(tmp_path / "b", names[::-1], rows[::-1], shard=2).read()
    assert one.ids == other.ids
    for field in SCORE_FIELDS:
        for a, b in zip(one.scores[field], other.scores[field], strict=True):
            np.testing.assert_array_equal(a, b)


def test_layers_of_zeros_and_huge_scores(tmp_path: Path) -> None:
    (row,) = rows_of(1)
    row.scores["text_guided"][0] = 0.0
    row.scores["text_guided"][1] *= 1e6
    profile = store_with(tmp_path, ["a"], [row]).read()
    assert (profile.scores["text_guided"][0][0] == 0).all()
    np.testing.assert_allclose(
        profile.scores["text_guided"][0][1], row.scores["text_guided"][1], rtol=1e-3, atol=1e-1
    )


def test_resuming_needs_the_same_backbone(tmp_path: Path) -> None:
    store_with(tmp_path, ["a"], rows_of(1))
    store = ProfileStore(tmp_path)
    store.open(META)
    store.append(["b"], rows_of(1, seed=1))
    assert store.ids() == ["a", "b"]
    with pytest.raises(StoreError, match="another dtype"):
        store.open({**META, "dtype": "bfloat16"})
    assert store.ids() == ["a", "b"]


def test_merge_takes_doubles_once(tmp_path: Path) -> None:
    rows = rows_of(6)
    left = store_with(tmp_path / "l", list("abcd"), rows[:4])
    right = store_with(tmp_path / "r", list("cdef"), rows[2:])
    both = ProfileStore(tmp_path / "both")
    both.merge([left, right])
    direct = store_with(tmp_path / "direct", list("abcdef"), rows).read()
    merged = both.read()
    assert merged.ids == direct.ids
    for field in SCORE_FIELDS:
        for a, b in zip(merged.scores[field], direct.scores[field], strict=True):
            np.testing.assert_array_equal(a, b)
    both.merge([right])
    assert len(both.ids()) == 6
    other = ProfileStore(tmp_path / "other")
    other.open({**META, "layers": [0]})
    with pytest.raises(StoreError, match="another layers"):
        both.merge([other])


def test_a_damaged_shard_is_set_aside_and_only_its_samples_are_missing(tmp_path: Path) -> None:
    store = store_with(tmp_path, list("abcdefgh"), rows_of(8))
    first = tmp_path / "part-00000.parquet"
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"part-00000.*damaged.*restore it, or run.*again"):
        store.read()
    assert first.exists()
    lines: list[str] = []
    assert store.recover(lines.append) == list("efgh")
    (line,) = lines
    assert "part-00000.parquet is damaged" in line
    assert "set aside as part-00000.corrupt" in line
    assert (tmp_path / "part-00000.corrupt").exists()
    assert store.ids() == list("efgh")
    store.append(list("abcd"), rows_of(4))
    assert len(store.read()) == 8


def test_a_half_written_shard_is_not_there(tmp_path: Path) -> None:
    store = store_with(tmp_path, list("abcd"), rows_of(4))
    (tmp_path / "part-00001.partial").write_bytes(b"PAR1")
    assert len(store.read()) == 4


def test_folders_without_a_profile(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no profile here"):
        ProfileStore(tmp_path / "none").read()
    empty = ProfileStore(tmp_path / "empty")
    empty.open(META)
    with pytest.raises(StoreError, match="empty"):
        empty.read()
    empty.meta_path.write_text('{"format": "somethi')
    with pytest.raises(StoreError, match="not readable"):
        empty.meta()


def test_size_and_speed_of_1000_samples(tmp_path: Path) -> None:
    """1000 samples x 32 layers x 576 tokens stay under 100 MB; here a tenth of that."""
    rng = np.random.default_rng(0)
    rows = [
        ProfileRow(
            576,
            40,
            60,
            {name: rng.lognormal(-7, 1.5, (32, 576)).astype(np.float32) for name in SCORE_FIELDS},
            {name: rng.random(32).astype(np.float32) for name in CURVE_FIELDS},
        )
        for _ in range(100)
    ]
    store = ProfileStore(tmp_path)
    store.open({**META, "layers": list(range(32))})
    store.append([str(i) for i in range(100)], rows)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10e6


def test_version_1_is_read_continued_and_merged(tmp_path: Path) -> None:
    """Two samples as an earlier release stored them: other names, and curves that are no longer read."""
    table = pq.read_table(VERSION_1 / "part-00000.parquet")
    old = ProfileStore(shutil.copytree(VERSION_1, tmp_path / "old"))
    profile = old.read()
    assert profile.meta["version"] == 2
    assert profile.meta["left_out"] == {}
    assert profile.layers == list(range(30))
    assert profile.ids == table["id"].to_pylist()
    assert profile.counts["num_text_queries"].tolist() == table["num_raters"].to_pylist()
    for field in CURVE_FIELDS:
        assert profile.curves[field].tolist() == table[field].to_pylist()
    for field in SCORE_FIELDS:
        fractions = np.array(table[field].to_pylist()).reshape(2, 30, -1)
        largest = np.array(table[f"{field}_max"].to_pylist())[..., None]
        np.testing.assert_allclose(profile.scores[field], fractions * largest, rtol=1e-6)

    # The same backbone goes on with it, and the folder is of version 2 then.
    known = json.loads((VERSION_1 / "meta.json").read_text())
    meta = {name: known[name] for name in ("backbone", "shape", "layers", "dtype", "prompt_digest")}
    meta["shape"] = known["shape"] | {"linear_flops": (1,) * 30}  # a field that came later, and no JSON type
    assert old.recover(pytest.fail) == profile.ids
    for _ in range(2):
        old.open(meta)
    with pytest.raises(StoreError, match="another shape"):
        old.open(meta | {"shape": known["shape"] | {"num_heads": 10}})
    assert json.loads(old.meta_path.read_text())["version"] == 2
    row = ProfileRow(
        9,
        4,
        5,
        {name: np.ones((30, 9), np.float32) for name in SCORE_FIELDS},
        {name: np.ones(30, np.float32) for name in CURVE_FIELDS},
    )
    old.append(["new"], [row])
    merged = ProfileStore(tmp_path / "merged")
    merged.merge([ProfileStore(VERSION_1), old])
    assert merged.read().ids == sorted([*profile.ids, "new"])
    for both in ([ProfileStore(VERSION_1), old], [old, ProfileStore(VERSION_1)]):
        ProfileStore(tmp_path / "again").merge(both)
        assert ProfileStore(tmp_path / "again").read().shape.linear_flops == (1,) * 30
    np.testing.assert_array_equal(
        merged.read().counts["num_text_queries"], old.read().counts["num_text_queries"]
    )


def test_rows_with_another_number_of_layers_are_refused(tmp_path: Path) -> None:
    """What an earlier release left of a backbone whose layers do not all have attention."""
    store = ProfileStore(tmp_path)
    store.open({**META, "layers": list(range(LAYERS + 3))})
    store.append(["a"], rows_of(1))
    with pytest.raises(StoreError, match="5 layers per sample, but meta.json lists 8"):
        store.read()


def test_other_versions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"format": "adaptinfer-profile", "version": 3}')
    with pytest.raises(StoreError, match="version 3; need .*version 1 or 2"):
        ProfileStore(tmp_path).read()


def test_a_meta_with_tuples_is_continued(tmp_path: Path) -> None:
    """JSON has lists only; the shape of a backbone holds tuples."""
    meta = {**META, "shape": {"num_layers": LAYERS, "linear_flops": (1,) * LAYERS}}
    store = ProfileStore(tmp_path)
    store.open(meta)
    store.open(meta)
    with pytest.raises(StoreError, match="another shape"):
        store.open({**meta, "shape": {"num_layers": LAYERS, "linear_flops": (2,) * LAYERS}})
