"""Settings of the vLLM plug-in; nothing here needs vLLM."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pruning_runtime import Schedule, ScheduleError, Stage
from pruning_runtime.schedule import BackboneIdentity, Budget, ScorerChoice
from pruning_runtime.scorers import SCORERS, make_scorer
from pruning_runtime.vllm import interface
from pruning_runtime.vllm.limits import check_backbone, prepare_server
from pruning_runtime.vllm.setting import (
    Setting,
    decode_setting,
    servable_scorers,
    server_setting,
    why_scorer_not_served,
    without_request_options,
)

ROOT = Path(__file__).parents[2]


def schedule(*stages: tuple[int, float], scorer: str = "divprune", **fields: Any) -> Schedule:
    return Schedule(
        backbone=BackboneIdentity(name="demo", model_type="llava", num_layers=12),
        stages=tuple(Stage(layer=layer, keep_ratio=ratio) for layer, ratio in stages),
        scorer=ScorerChoice(name=scorer),
        **fields,
    )


def test_scorers_that_need_the_image_only_are_served() -> None:
    assert servable_scorers() == ["divprune", "strided"]
    refused = {name: why_scorer_not_served(make_scorer(name)) for name in SCORERS}
    for name, reason in (
        ("text_guided", "attention of the text"),
        ("cdpruner", "reads the text"),
        ("v2drop", "reads a decoder layer"),
        ("fastervlm", "attention of the vision tower"),
        ("evs", "compares frames"),
        ("random", "number of the prompt"),
    ):
        assert reason in (refused[name] or "")


def test_a_schedule_becomes_a_setting(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    schedule((-1, 0.25), image_newlines="ranked").save(path)
    setting = server_setting({"schedule": str(path)})
    assert setting == Setting(keep_ratio=0.25, scorer=ScorerChoice(name="divprune"), image_newlines="ranked")
    assert server_setting({"schedule": str(path), "scorer": "strided"}).scorer.name == "strided"
    assert Setting.of_schedule(schedule(), "none") == Setting()
    assert decode_setting(setting.encode()) == setting


def test_the_stage_s_own_scorer_counts() -> None:
    own = schedule((-1, 0.5), scorer="text_guided")
    stage = own.stages[0].model_copy(update={"scorer": ScorerChoice(name="strided")})
    assert Setting.of_schedule(own.model_copy(update={"stages": (stage,)}), "s").scorer.name == "strided"


def test_a_refusal_names_the_command_with_the_schedule_s_budget() -> None:
    budget = Budget(kind="processed", target=0.35, processed=0.35, published=0.35)
    with pytest.raises(ScheduleError, match=r"^s.json: .* layer 3; .*RUN --budget 35% --for vllm`$"):
        Setting.of_schedule(schedule((3, 0.2), budget=budget), "s.json")
    with pytest.raises(ScheduleError, match="--budget 25% --for vllm"):
        Setting.of_schedule(schedule((-1, 0.2), dropped_tokens="merge"), "s.json")


def test_a_request_changes_what_it_names() -> None:
    base = Setting(keep_ratio=0.5, image_newlines="ranked")
    assert base.changed_by({"fps": 2, "keep_ratio": None}) is base
    changed = base.changed_by(
        {"keep_ratio": 0.25, "scorer": {"name": "divprune", "options": {"scope": "image"}}}
    )
    assert (changed.keep_ratio, changed.scorer.options) == (0.25, {"scope": "image"})
    assert changed.image_newlines == "ranked"
    assert without_request_options({"fps": 2, "keep_ratio": 0.5, "scorer": "strided"}) == {"fps": 2}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"keep_ratio": 2.0}, "hf_overrides: adaptinfer: field `keep_ratio`: .* less than or equal to 1"),
        ({"keep_ratio": True}, "`keep_ratio`"),
        ({"ratio": 0.5}, "field `ratio`: Extra inputs"),
        ({"scorer": "mmtok"}, "'mmtok' reads the text.*choose divprune, strided"),
        ({"schedule": "missing.json"}, "missing.json: there is no such file"),
        ("s.json", "'s.json'; write"),
    ],
)
def test_wrong_entries_of_a_server(entry: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        server_setting(entry)


def test_at_least_one_token_is_kept() -> None:
    assert [Setting(keep_ratio=0.01).kept(number) for number in (1, 40, 50, 149, 150)] == [1, 1, 1, 1, 2]
    assert Setting(keep_ratio=0.5).kept(5) == 3  # half rounds up, as in the runtime


def test_schedules_for_other_backbones() -> None:
    text = SimpleNamespace(num_hidden_layers=12)
    config = SimpleNamespace(model_type="llava", get_text_config=lambda: text)
    check_backbone(schedule((-1, 0.5)), config)
    text.num_hidden_layers = 32
    with pytest.raises(ScheduleError, match="num_layers is 32, the schedule was made for 12"):
        check_backbone(schedule((-1, 0.5)), config)


def test_servers_without_a_setting_are_left_alone() -> None:
    untouched = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace()))
    prepare_server(untouched, ())
    assert vars(untouched.model_config.hf_config) == {}


def test_other_releases_and_signatures_are_refused() -> None:
    assert interface.problem_of_release((0, 32, 0)) is None
    assert interface.problem_of_release((0, 32, 1, "dev3")) is None
    assert interface.problem_of_release((0, 33, 0)) == "it supports vLLM 0.32 only, and 0.33.0 is installed"

    class Processor:
        def hashes(self, inputs: object, more: object) -> None: ...

    def problem(path: str, *parameters: str) -> str | None:
        return interface.problem_of_signatures({"Processor": Processor}, {path: parameters})

    assert problem("Processor.hashes", "self", "inputs", "more") is None
    assert "has the parameters" in (problem("Processor.hashes", "self", "inputs") or "")
    assert problem("Processor.gone", "self") == "this build of vLLM has no Processor.gone"


def test_the_entry_point_exists_and_importing_it_needs_no_vllm() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (point,) = project["entry-points"]["vllm.general_plugins"].values()
    module, function = point.split(":")
    code = (
        "import sys; sys.modules['vllm'] = None; import pruning_runtime.vllm.setting, "
        f"pruning_runtime.vllm.limits, pruning_runtime.vllm.selection, {module} as plugin; "
        f"print(callable(plugin.{function}), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "True True"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_registering_without_vllm_fails_at_vllm_itself() -> None:
    from pruning_runtime.vllm import register

    with pytest.raises(ModuleNotFoundError, match="vllm"):
        register()
