"""The schedule file: what is written comes back, and every wrong file is refused in one clear line."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pruning_runtime import Schedule, ScheduleError, Stage
from pruning_runtime.schedule import VERSION, BackboneIdentity, Budget, ScorerChoice

OLD_FILES = Path(__file__).parents[1] / "data" / "schedule_v1"

DOCUMENT: dict[str, Any] = {
    "format": "adaptinfer-schedule",
    "version": 2,
    "backbone": {
        "name": "some/backbone",
        "revision": "abc",
        "model_type": "llava",
        "num_layers": 12,
        "config_digest": "sha256:0",
    },
    "stages": [
        {"layer": 1, "keep_ratio": 0.5},
        {"layer": 4, "keep_ratio": 0.25, "keep_tokens": 4},
        {"layer": 10, "keep_ratio": 0.0},
    ],
    "scorer": {"name": "text_guided", "options": {}},
    "positions": "renumbered",
    "image_newlines": "ranked",
    "dropped_tokens": "merge",
    "budget": {
        "kind": "processed",
        "target": 0.4,
        "processed": 0.4,
        "published": 0.3,
        "flops": 0.5,
        "kv": 0.6,
        "latency": 1.1,
    },
    "evidence": {"samples": 1000, "change_points": [1, 4], "nested": {"a": [None, "é", 0.1]}},
    "provenance": {"seed": 0},
}


def with_changes(path: str, value: Any) -> str:
    """The document's text with the field at ``path`` (``stages.1.layer``) set to ``value``."""
    document = copy.deepcopy(DOCUMENT)
    *parents, last = path.split(".")
    place: Any = document
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    place[last] = value
    return json.dumps(document)


def refusal(text: str) -> str:
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_json(text, source="some.json")
    message = str(caught.value)
    assert message.startswith("some.json: ")
    assert "\n" not in message
    return message


# ---- round trip


def test_the_documented_file_loads() -> None:
    schedule = Schedule.from_json(json.dumps(DOCUMENT))
    assert [(stage.layer, stage.keep_ratio) for stage in schedule.stages] == [(1, 0.5), (4, 0.25), (10, 0.0)]
    assert (schedule.scorer.name, schedule.positions) == ("text_guided", "renumbered")
    assert json.loads(schedule.to_json()) == DOCUMENT


def test_save_then_load_gives_the_same_schedule(tmp_path: Path) -> None:
    schedule = Schedule.from_json(json.dumps(DOCUMENT))
    path = tmp_path / "new" / "folder" / "4_schedule.json"
    schedule.save(path)
    assert Schedule.load(path) == Schedule.load(str(path)) == schedule
    assert path.read_text(encoding="utf-8") == schedule.to_json()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    num_layers = draw(st.integers(2, 60))
    count = draw(st.integers(0, min(5, num_layers - 1)))
    layers = draw(
        st.lists(st.integers(0, num_layers - 2), min_size=count, max_size=count, unique=True).map(sorted)
    )
    ratios = sorted(draw(st.lists(st.floats(0, 1), min_size=count, max_size=count)), reverse=True)
    return Schedule(
        backbone=BackboneIdentity(name=draw(st.text()), model_type="llava", num_layers=num_layers),
        stages=tuple(Stage(layer=one, keep_ratio=ratio) for one, ratio in zip(layers, ratios, strict=True)),
        scorer=draw(
            st.sampled_from(
                [ScorerChoice(name="text_guided"), ScorerChoice(name="random", options={"seed": 3})]
            )
        ),
        positions=draw(st.sampled_from(["original", "renumbered"])),
        image_newlines=draw(st.sampled_from(["protected", "ranked"])),
        budget=draw(st.none() | st.just(Budget(kind="flops", target=0.1, processed=0.2, published=0.3))),
    )


@given(schedules())
@settings(deadline=None, max_examples=50)
def test_every_schedule_survives_the_file_to_the_last_bit(schedule: Schedule) -> None:
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_positions_default_to_the_original_ones() -> None:
    document = {key: value for key, value in DOCUMENT.items() if key != "positions"}
    assert Schedule.from_json(json.dumps(document)).positions == "original"


def test_separators_are_protected_where_a_file_does_not_name_them() -> None:
    document = {key: value for key, value in DOCUMENT.items() if key != "image_newlines"}
    assert Schedule.from_json(json.dumps(document)).image_newlines == "protected"


# ---- wrong files


def test_half_of_a_surrogate_pair_is_refused_as_no_file_could_hold_it() -> None:
    message = refusal(json.dumps(DOCUMENT | {"evidence": {"solver": {"solver": "\ud83d"}}}))
    assert "not a complete JSON document" in message
    assert "surrogates" in message


@pytest.mark.parametrize("length", [0, 1, 40, 300])
def test_a_truncated_file_is_refused(length: int) -> None:
    message = refusal(json.dumps(DOCUMENT, indent=1)[:length])
    assert "not a complete JSON document" in message
    assert "write it again" in message


@pytest.mark.parametrize("text", ["[]", "3", '{"stages": []}', '{"format": "other", "version": 1}'])
def test_a_json_file_that_is_no_schedule_is_refused(text: str) -> None:
    assert "`format` must be 'adaptinfer-schedule'" in refusal(text)


@pytest.mark.parametrize("version", [0, 3, "1", "2", None, True])
def test_an_unknown_version_is_refused(version: Any) -> None:
    message = refusal(with_changes("version", version))
    assert f"version {version!r}" in message
    assert f"reads 1 and {VERSION}" in message


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        (
            "scorer.name",
            "text_guide",
            ["`scorer`", "'text_guide'", "known: cdpruner, dart, divprune"],
        ),
        ("scorer.options", {"sead": 1}, ["`scorer`", "'text_guided'", "{'sead': 1}"]),
        ("scorer", {"name": "random", "options": {"seed": "x"}}, ["'random'", "integer", "'x'"]),
        ("stages.1.layer", 0, ["`stages`", "must increase", "1 then 0"]),
        ("stages.1.layer", 1, ["`stages`", "must increase", "1 then 1"]),
        ("stages.2.layer", 11, ["stages", "layer 11 is out of range", "-1 to 10 is allowed"]),
        ("stages.2.layer", 99, ["stages", "layer 99 is out of range", "-1 to 10 is allowed"]),
        ("stages.0.layer", -2, ["`stages.0.layer`", "greater than or equal to -1", "-2"]),
        ("stages.0.layer", 1.5, ["`stages.0.layer`", "valid integer", "1.5"]),
        ("stages.1.keep_ratio", 0.75, ["`stages`", "cannot rise", "0.5 at layer 1", "0.75 at layer 4"]),
        ("stages.0.keep_ratio", 1.01, ["`stages.0.keep_ratio`", "less than or equal to 1", "1.01"]),
        ("stages.2.keep_ratio", -0.1, ["`stages.2.keep_ratio`", "greater than or equal to 0", "-0.1"]),
        ("stages.2.keep_ratio", float("nan"), ["`stages.2.keep_ratio`", "finite", "nan"]),
        ("stages.2.keep_ratio", float("inf"), ["`stages.2.keep_ratio`", "finite", "inf"]),
        ("stages.2.keep_ratio", None, ["`stages.2.keep_ratio`", "number", "None"]),
        ("stages.0.keep_tokens", -1, ["`stages.0.keep_tokens`", "greater than or equal to 0", "-1"]),
        ("stages.0.ratio", 0.5, ["`stages.0.ratio`", "not permitted", "0.5"]),
        ("comment", "hello", ["`comment`", "not permitted", "hello"]),
        ("positions", "kept", ["`positions`", "'original' or 'renumbered'", "'kept'"]),
        (
            "budget.kind",
            "tokens",
            ["`budget.kind`", "'processed', 'published', 'flops', 'kv' or 'latency'", "'tokens'"],
        ),
        ("budget.processed", 1.6, ["`budget.processed`", "less than or equal to 1", "1.6"]),
        ("backbone.num_layers", 0, ["`backbone.num_layers`", "greater than or equal to 1", "0"]),
        ("backbone", {"name": "x", "num_layers": 4}, ["`backbone.model_type`", "required"]),
    ],
)
def test_a_wrong_field_is_refused_by_name_value_and_range(path: str, value: Any, parts: list[str]) -> None:
    message = refusal(with_changes(path, value))
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("name", ["random", "strided", "text_guided", "last_token"])
def test_any_scorer_may_stand_before_the_decoder(name: str) -> None:
    document = json.loads(with_changes("stages.0.layer", -1)) | {"scorer": {"name": name}}
    assert Schedule.from_json(json.dumps(document)).stages[0].layer == -1


def test_the_last_useful_layer_is_the_one_before_the_last() -> None:
    assert Schedule.from_json(with_changes("stages.2.layer", 10)).stages[2].layer == 10


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"nothing\.json: there is no such file") as caught:
        Schedule.load(tmp_path / "nothing.json")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ScheduleError, match=r"weights\.bin: cannot be read"):
        Schedule.load(path)


def test_a_file_s_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(with_changes("version", 7))
    with pytest.raises(ScheduleError, match=r"wrong\.json: version 7"):
        Schedule.load(path)


@pytest.mark.parametrize("name", ["adaptinfer/llava-1.5-7b-65", "", "../schedule", "fastv/llava-1.5-7b.json"])
def test_an_unknown_preset_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.preset(name)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in Schedule.presets())


def test_a_schedule_cannot_be_changed_after_its_checks() -> None:
    schedule = Schedule.from_json(json.dumps(DOCUMENT))
    with pytest.raises(ValidationError, match="frozen"):
        schedule.stages[0].keep_ratio = 2.0


# ---- saving in one step


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "4_schedule.json"
    old = Schedule.from_json(json.dumps(DOCUMENT))
    old.save(path)
    new = old.model_copy(update={"positions": "original"})

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("disk is full")

    for place, name in ((Schedule, "to_json"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fails)
            with pytest.raises(OSError, match="disk is full"):
                new.save(path)
        assert Schedule.load(path) == old
    new.save(path)
    assert Schedule.load(path) == new


def test_a_write_that_fails_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Schedule) -> str:
        raise OSError("disk is full")

    monkeypatch.setattr(Schedule, "to_json", fails)
    with pytest.raises(OSError, match="disk is full"):
        Schedule.from_json(json.dumps(DOCUMENT)).save(tmp_path / "4_schedule.json")
    assert list(tmp_path.iterdir()) == []


def test_a_saved_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    Schedule.from_json(json.dumps(DOCUMENT)).save(tmp_path / "4_schedule.json")
    (tmp_path / "other.json").write_text("{}")
    assert (tmp_path / "4_schedule.json").stat().st_mode == (tmp_path / "other.json").stat().st_mode


# ---- counts and JSON Schema


@pytest.mark.parametrize(
    ("ratio", "vision", "kept"),
    [
        (0.5, 1, 1),
        (0.5, 3, 2),
        (0.5, 5, 3),
        (0.25, 2, 1),
        (0.25, 1, 0),
        (0.3, 16, 5),
        (1.0, 7, 7),
        (0.0, 9, 0),
    ],
)
def test_a_half_rounds_up(ratio: float, vision: int, kept: int) -> None:
    # Python's `round` gives 0, 2 and 2 for the first, second and third: halves to even.
    assert Stage(layer=0, keep_ratio=ratio).kept(vision) == kept


@given(st.integers(1, 20_000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
@settings(deadline=None)
def test_an_exact_fraction_keeps_exactly_its_count(fraction: tuple[int, int]) -> None:
    count, total = fraction
    assert Stage(layer=0, keep_ratio=count / total).kept(total) == count


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 5_000))
@settings(deadline=None)
def test_kept_counts_stay_in_range_and_grow_with_the_ratio(one: float, other: float, vision: int) -> None:
    fewer, more = (Stage(layer=0, keep_ratio=ratio).kept(vision) for ratio in sorted((one, other)))
    assert 0 <= fewer <= more <= vision


def test_the_format_has_a_json_schema() -> None:
    schema = Schedule.model_json_schema()
    assert set(schema["properties"]) == set(DOCUMENT)
    assert set(schema["required"]) == {"backbone", "stages", "scorer"}
    assert schema["additionalProperties"] is False
    ratio = schema["$defs"]["Stage"]["properties"]["keep_ratio"]
    assert (ratio["minimum"], ratio["maximum"]) == (0.0, 1.0)
    json.dumps(schema)


# ---- scorers of stages, and version 1


def test_a_stage_s_scorer_comes_back() -> None:
    text = with_changes("stages.1.scorer", {"name": "strided", "options": {}})
    schedule = Schedule.from_json(text)
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert [scorer.name for scorer in schedule.scorers().values()] == [
        "text_guided",
        "strided",
        "text_guided",
    ]
    assert "scorer" not in json.loads(schedule.to_json())["stages"][0]


def test_an_unknown_scorer_of_a_stage_is_refused() -> None:
    message = refusal(with_changes("stages.1.scorer", {"name": "nothing"}))
    assert "stages.1.scorer" in message
    assert "unknown scorer 'nothing'" in message


@pytest.mark.parametrize("path", sorted(OLD_FILES.glob("*.json")), ids=lambda path: path.stem)
def test_a_version_1_file_keeps_its_meaning(path: Path, tmp_path: Path) -> None:
    """Files as earlier releases wrote them."""
    old = json.loads(path.read_text(encoding="utf-8"))
    assert old["version"] == 1
    schedule = Schedule.load(path)
    assert [(stage.layer, stage.keep_ratio) for stage in schedule.stages] == [
        (stage["layer"], stage["keep_ratio"]) for stage in old["stages"]
    ]
    assert {scorer.name for scorer in schedule.scorers().values()} == {old["scorer"]["name"]}
    assert schedule.image_newlines == old["separators"]
    assert schedule.dropped_tokens == {"none": "discard", "merged": "merge"}[old["residual"]]
    schedule.save(tmp_path / "new.json")
    assert json.loads((tmp_path / "new.json").read_text(encoding="utf-8"))["version"] == 2
    assert Schedule.load(tmp_path / "new.json") == schedule


def test_merged_tokens_of_version_1() -> None:
    (path, *_) = sorted(OLD_FILES.glob("*.json"))
    text = path.read_text(encoding="utf-8").replace('"residual": "none"', '"residual": "merged"')
    assert Schedule.from_json(text).dropped_tokens == "merge"


@pytest.mark.parametrize("field", ["dropped_tokens", "image_newlines", "stages.0.scorer"])
def test_version_1_has_no_fields_of_version_2(field: str) -> None:
    document = json.loads(with_changes(field, {"name": "strided"} if "scorer" in field else "discard"))
    document["version"] = 1
    with pytest.raises(ScheduleError, match="belongs to version 2"):
        Schedule.from_json(json.dumps(document))
