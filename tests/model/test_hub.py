"""Schedules on the hub: the real client against a stand-in of the hub's HTTP interface, and the local index."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image

from pruning_runtime import Schedule, ScheduleError, find_backbone, pruned
from pruning_runtime.hub import index_folder
from pruning_runtime.schedule import Budget
from schedule_finder import load_run
from tests.support.command_line import call
from tests.support.hub_stand_in import Hub, hub_stand_in
from tests.support.schedules import schedule_for
from tests.support.tiny_folder import write_jsonl, write_llava_folder
from tests.support.tiny_models import FAMILIES

REPO = "somebody/llava-schedules"
BACKBONE = "somebody/tiny-llava"
RESULTS = {
    "full": {"n": 50, "score": 0.9},
    "schedule": {"n": 50, "score": 0.88, "score_low": 0.76, "score_high": 0.94, "kl": 0.02},
}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_stand_in() as running:
        yield running


@pytest.fixture(autouse=True)
def client(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The client of huggingface_hub talks to the stand-in, with a cache of its own."""
    hub.repositories.clear()
    hub.branches.clear()
    hub.commits.clear()
    constants = huggingface_hub.constants
    for name, value in (
        ("ENDPOINT", hub.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_CACHE", str(tmp_path / "hub")),
        ("HF_XET_HIGH_PERFORMANCE", False),
        # A busy machine may take longer than the client's 10 s; it would then go on with an older commit.
        ("HF_HUB_ETAG_TIMEOUT", 120),
        ("HF_HUB_DOWNLOAD_TIMEOUT", 120),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("ADAPTINFER_CACHE", str(tmp_path / "cache"))


def a_schedule(model: Any, ratio: float) -> Schedule:
    budget = Budget(kind="processed", target=ratio, processed=ratio, published=0.9 * ratio)
    made = schedule_for(model, (1, ratio))
    known = {"name": "llava-hf/llava-1.5-7b-hf", "config_digest": find_backbone(model).config_digest}
    name = made.backbone.model_copy(update=known)
    return made.model_copy(update={"budget": budget, "backbone": name})


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["llava"].build()


def test_several_budgets_share_a_repository_and_a_card(hub: Hub, model: Any, tmp_path: Path) -> None:
    half, quarter = a_schedule(model, 0.5), a_schedule(model, 0.25)
    Image.new("RGB", (4, 4)).save(tmp_path / "figure.png")
    address = half.push_to_hub(REPO, results=RESULTS, figure=tmp_path / "figure.png", token="secret")
    assert address.startswith(f"{hub.url}/{REPO}/commit/")
    assert hub.tokens[-1] == "Bearer secret"
    quarter.push_to_hub(REPO)
    assert set(hub.repositories[REPO]) == {
        "README.md",
        "evidence.png",
        "schedules/50pct-processed.json",
        "schedules/50pct-processed.results.json",
        "schedules/25pct-processed.json",
    }
    assert [commit["summary"] for commit in hub.commits] == [
        "Schedule 50pct-processed",
        "Schedule 25pct-processed",
    ]
    assert Schedule.from_pretrained(REPO, budget=0.25) == quarter
    assert Schedule.from_pretrained(f"hf://{REPO}", name="50pct-processed") == half
    assert Schedule.of(f"hf://{REPO}/schedules/25pct-processed.json") == quarter
    card = hub.repositories[REPO]["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == ["llava-hf/llava-1.5-7b-hf"]
    assert metadata["library_name"] == "adaptinfer"
    for line in (
        "| `25pct-processed` | after layer 1: 25 % | text_guided | discard | 25 % | 22.5 % |",
        "| `50pct-processed` | after layer 1: 50 % | text_guided | discard | 50 % | 45 % |",
        "| `50pct-processed` | schedule | 50 | 88 % | 76 % to 94 % | 0.02 |",
        "![Evidence for the schedule](evidence.png)",
        f'Schedule.from_pretrained("{REPO}", budget=0.25)',
    ):
        assert line in card


def test_numbers_of_a_replaced_schedule_are_removed(hub: Hub, model: Any) -> None:
    half = a_schedule(model, 0.5)
    half.push_to_hub(REPO, results=RESULTS)
    assert "76 % to 94 %" in hub.repositories[REPO]["README.md"].decode()
    half.model_copy(update={"dropped_tokens": "merge"}).push_to_hub(REPO)
    assert "76 %" not in hub.repositories[REPO]["README.md"].decode()
    assert "schedules/50pct-processed.results.json" not in hub.repositories[REPO]
    assert Schedule.from_pretrained(REPO).dropped_tokens == "merge"


def test_a_schedule_from_the_hub_prunes(hub: Hub, model: Any) -> None:
    a_schedule(model, 0.5).push_to_hub(REPO)
    with pruned(model, f"hf://{REPO}") as record, torch.no_grad():
        model(**FAMILIES["llava"].batch((1,)))
    assert record.stages[0].keep == (8,)


def test_a_choice_that_is_not_unique_lists_what_is_there(hub: Hub, model: Any) -> None:
    for ratio in (0.5, 0.25):
        a_schedule(model, ratio).push_to_hub(REPO)
    with pytest.raises(
        ScheduleError, match=r"several schedules; give a budget or a name \(there: .*25pct-processed"
    ):
        Schedule.from_pretrained(REPO)
    with pytest.raises(ScheduleError, match=r"no schedule with budget 0.3 \(there: "):
        Schedule.from_pretrained(REPO, budget=0.3)
    with pytest.raises(ScheduleError, match="no schedule with name 'mine' and budget 0.5"):
        Schedule.from_pretrained(REPO, name="mine", budget=0.5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("somebody/nothing", "cannot be read from the hub"),
        ("./nothing.json", "no such file or folder"),
        ("nothing", "neither a file, nor a folder, nor a repository"),
        ("hf://somebody", "neither a file, nor a folder, nor a repository"),
    ],
)
def test_what_is_not_there_is_one_line(source: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        Schedule.from_pretrained(source)
    assert "\n" not in str(caught.value)


def test_without_a_network_the_error_names_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)  # the client waits between its attempts
    with pytest.raises(ScheduleError, match="hf://somebody/schedules: cannot be read from the hub"):
        Schedule.from_pretrained("somebody/schedules")


def test_folders_are_read_like_repositories(model: Any, tmp_path: Path) -> None:
    a_schedule(model, 0.5).save(tmp_path / "4_schedules" / "half.json")
    a_schedule(model, 0.25).save(tmp_path / "4_schedules" / "quarter.json")
    (tmp_path / "4_schedules" / "other.json").write_text("{}")
    assert Schedule.from_pretrained(tmp_path, budget=0.25).stages[0].keep_ratio == 0.25
    assert Schedule.from_pretrained(tmp_path, name="half").stages[0].keep_ratio == 0.5
    assert Schedule.from_pretrained(tmp_path / "4_schedules" / "half.json").stages[0].keep_ratio == 0.5
    with pytest.raises(ScheduleError, match=r"other\.json"):
        Schedule.from_pretrained(tmp_path / "4_schedules", name="other")


def test_a_file_is_not_taken_for_another_choice(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "half.json"
    a_schedule(model, 0.5).save(path)
    assert Schedule.from_pretrained(path, budget=0.5, name="half").stages[0].keep_ratio == 0.5
    with pytest.raises(ScheduleError, match=r"no schedule with budget 0.1 \(there: half"):
        Schedule.from_pretrained(path, budget=0.1)
    with pytest.raises(ScheduleError, match="no schedule with name 'other'"):
        Schedule.from_pretrained(path, name="other")


def test_two_schedules_of_one_budget_are_never_chosen_between(model: Any, tmp_path: Path) -> None:
    processed = a_schedule(model, 0.25)
    assert processed.budget is not None
    flops = processed.model_copy(update={"budget": processed.budget.model_copy(update={"kind": "flops"})})
    for name, one in (("a", flops), ("b", processed)):
        one.save(tmp_path / "schedules" / f"{name}.json")
        one.add_to_index()
    with pytest.raises(ScheduleError, match="several schedules with budget 0.25; give a name"):
        Schedule.from_pretrained(tmp_path, budget=0.25)
    with pytest.raises(ScheduleError, match="25pct-flops, 25pct-processed; load one of them"):
        Schedule.for_model(model, budget=0.25)


def test_a_damaged_neighbour_does_not_hide_the_one_that_was_named(model: Any, tmp_path: Path) -> None:
    a_schedule(model, 0.5).save(tmp_path / "half.json")
    document = json.loads((tmp_path / "half.json").read_text())
    (tmp_path / "later.json").write_text(json.dumps(document | {"version": 99}))
    (tmp_path / "cut.json").write_text((tmp_path / "half.json").read_text()[:100])
    assert Schedule.from_pretrained(tmp_path, name="half").stages[0].keep_ratio == 0.5
    with pytest.raises(ScheduleError, match=r"cut\.json"):
        Schedule.from_pretrained(tmp_path, name="cut")


def test_a_model_finds_its_schedule_in_the_local_index(model: Any) -> None:
    with pytest.raises(ScheduleError, match=r"adaptinfer-profile run \S+ --dataset DATA --budget 25%"):
        Schedule.for_model(model, budget=0.25)
    quarter = a_schedule(model, 0.25)
    path = quarter.add_to_index()
    assert path.is_relative_to(index_folder())
    assert Schedule.for_model(model, budget=0.25) == quarter
    with pytest.raises(ScheduleError, match="budgets there: 0.25 processed"):
        Schedule.for_model(model, budget=0.5)
    with pytest.raises(ScheduleError, match="at budget 0.25"):
        Schedule.for_model(FAMILIES["qwen2_vl"].build(), budget=0.25)
    with pytest.raises(ScheduleError, match="cannot be indexed"):
        Schedule.preset("fastv/llava-1.5-7b").add_to_index()


def test_a_run_uploads_its_schedule_with_its_numbers_and_figure(hub: Hub, tmp_path: Path) -> None:
    checkpoint, data = write_llava_folder(tmp_path / "llava"), write_jsonl(tmp_path / "data", 16)
    call(
        "run", checkpoint, "--dataset", data, "--samples", 8, "--eval-samples", 6, "--out", tmp_path / "run",
        "--solver", "paper", "--budget", "40%", "--max-new-tokens", 1, "--baselines", "random",
    )  # fmt: skip
    run = load_run(tmp_path / "run")
    run.push_to_hub(REPO)
    assert Schedule.from_pretrained(REPO) == run.schedule
    files = hub.repositories[REPO]
    assert files["evidence.png"] == (tmp_path / "run" / "6_figures" / "5_accuracy.png").read_bytes()
    card = files["README.md"].decode()
    assert "| `40pct-processed` | random | 6 |" in card
    assert "base_model" not in card  # the checkpoint is a folder of this machine
    run.search(0.5, solver="paper")
    run.push_to_hub(REPO)
    assert "schedules/50pct-processed.results.json" not in hub.repositories[REPO]


# Slow: in a process that has run most of the fast suite before, the client waits 210 s and finds no `v2`; alone and
# among the tests up to here it takes 3 s. What the earlier tests leave behind is not known (docs/log.md).
@pytest.mark.slow
def test_a_backbone_comes_from_the_hub_at_the_revision_that_was_asked_for(hub: Hub, tmp_path: Path) -> None:
    """The real client of transformers: both branches load, and the schedule names the commit."""
    contents = {}
    for branch, seed in (("main", 0), ("v2", 1)):
        folder = write_llava_folder(tmp_path / branch, seed=seed)
        contents[branch] = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repositories[BACKBONE] = contents["main"]
    hub.branches[BACKBONE, "v2"] = contents["v2"]
    data = write_jsonl(tmp_path / "data", 16)
    weights = {}
    for branch, option in (("main", ()), ("v2", ("--revision", "v2"))):
        out = tmp_path / f"run_{branch}"
        call(
            "profile", BACKBONE, *option, "--dataset", data, "--samples", 8, "--eval-samples", 4, "--out", out
        )
        call("detect", out)
        call("schedule", out, "--solver", "paper", "--budget", "40%")
        run = load_run(out)
        commit = hub.commit(contents[branch])
        assert run.schedule.backbone.name == BACKBONE
        assert run.schedule.backbone.revision == commit
        assert run.schedule.provenance["revision"] == commit
        assert run.schedule.provenance["loading"].get("revision") == (option[1] if option else None)
        weights[branch] = run.schedule.backbone.fingerprint
    assert weights["main"] != weights["v2"]
    # The branch moves on: the run that was begun is of other weights, and nothing is added to it.
    hub.branches[BACKBONE, "v2"] = contents["main"]
    line = call(
        "profile", BACKBONE, "--revision", "v2", "--dataset", data, "--samples", 8, "--eval-samples", 4,
        "--out", tmp_path / "run_v2", code=2,
    )  # fmt: skip
    assert "changed" in line
    line = call(
        "profile", BACKBONE, "--revision", "none", "--dataset", data, "--samples", 8, "--out", tmp_path / "no", code=2
    )  # fmt: skip
    assert "none" in line
