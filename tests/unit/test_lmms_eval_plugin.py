"""The parts of the lmms-eval plug-in that need no lmms-eval; tests/lmms runs it for real."""

from __future__ import annotations

import ast
import importlib.util
import json
import string
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pruning_runtime import Schedule
from schedule_finder.errors import InputError
from schedule_finder.evaluation.metrics import METRICS
from schedule_finder.lmms_eval.arguments import PruningArguments
from schedule_finder.lmms_eval.demo_tasks import GROUP, TASKS, write_tasks
from schedule_finder.lmms_eval.recording import (
    PromptCosts,
    TaskRecord,
    agreement,
    read_records,
    summary_lines,
    write_records,
)
from schedule_finder.lmms_eval.task_functions import accuracy_plus, chosen_letter, f1, precision, results

ROOT = Path(__file__).parents[2]
PRESET = "fastv/llava-1.5-7b"


def test_loading_the_plug_in_imports_nothing_heavy() -> None:
    """A plug-in that fails or is slow to load harms every other model of lmms-eval."""
    code = (
        "import sys, schedule_finder.lmms_eval as plugin; plugin.manifest; "
        "print([name for name in ('torch', 'transformers', 'lmms_eval', 'pandas', 'datasets', 'pydantic') "
        "if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_the_entry_point_and_the_class_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (point,) = project["entry-points"]["lmms_eval.models"].values()
    module, function = point.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    source = Path(importlib.util.find_spec(module).origin)  # type: ignore[union-attr, arg-type]
    (path,) = [
        node.value
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Constant) and str(node.value).endswith(".AdaptInfer")
    ]
    file = ROOT / Path(*path.split(".")[:-1]).with_suffix(".py")
    classes = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    assert classes == ["AdaptInfer"]


def test_own_arguments_are_taken_out() -> None:
    given = {"base": "llava_hf", "schedule": "s.json", "pretrained": "p", "record": "r.json", "baseline": ""}
    own, others = PruningArguments.take(given)
    assert own == PruningArguments("llava_hf", "s.json", record=Path("r.json"))
    assert others == {"pretrained": "p"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"schedule": "s.json"}, "no base"),
        ({"base": "llava_hf"}, "no schedule"),
        ({"base": "llava_hf", "baseline": "random"}, "no schedule"),
        (
            {"base": "llava_hf", "schedule": "s.json", "baseline": "best"},
            "baseline=best; choose full, smaller-images, ",
        ),
    ],
)
def test_wrong_arguments_are_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=f"--model_args: {message}"):
        PruningArguments.take(given)


class Accepting:
    """A backbone of the schedule's kind, as far as `Schedule.check_backbone` asks."""

    def __init__(self, schedule: Schedule) -> None:
        self.name, self.model_type = schedule.backbone.name, schedule.backbone.model_type
        self.shape = type("Shape", (), {"num_layers": schedule.backbone.num_layers})()
        self.config_digest = schedule.backbone.config_digest


def test_baselines_are_made_from_the_schedule() -> None:
    schedule = Schedule.preset(PRESET)
    backbone: Any = Accepting(schedule)

    def applied(baseline: str | None) -> tuple[Schedule, float]:
        return PruningArguments("llava_hf", PRESET, baseline).applied(backbone)

    assert applied(None) == (schedule, 1.0)
    assert applied("full") == (schedule.model_copy(update={"stages": ()}), 1.0)
    other, scale = applied("strided")
    assert (other.stages, other.scorer.name, scale) == (schedule.stages, "strided", 1.0)
    unpruned, scale = applied("smaller-images")
    assert unpruned.stages == ()
    # FastV: half the tokens from layer 3 on, of 32; the layers before them compute all.
    (stage,) = schedule.stages
    whole = stage.layer + 1
    processed = (
        schedule.budget.processed if schedule.budget else (whole + (32 - whole) * stage.keep_ratio) / 32
    )
    assert scale**2 == pytest.approx(processed)
    nothing, scale = PruningArguments("llava_hf", None, "full").applied(backbone)
    assert (nothing.stages, nothing.backbone.num_layers, scale) == ((), 32, 1.0)


def costs(tokens: int, flops: float = 2e9) -> PromptCosts:
    return PromptCosts(tokens, 10, tokens / 2, flops, 2.0**20, 5.0)


def test_records_are_written_and_read_again(tmp_path: Path) -> None:
    task = TaskRecord([costs(64), costs(32)])
    for document, answer in ((0, "red"), (1, "blue"), (1, "green")):
        task.add_answer(document, answer)
    assert task.answers == {"0": "red", "1": "blue", "1#2": "green"}
    assert task.means()["vision_tokens"] == 48
    assert task.means()["computed"] == 24
    write_records(tmp_path / "record.json", {"pope": task}, {"base": "llava_hf"})
    assert read_records(tmp_path / "record.json") == {"pope": task}
    assert json.loads((tmp_path / "record.json").read_text())["base"] == "llava_hf"


def test_a_broken_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with pytest.raises(InputError, match="run with record="):
        read_records(path)
    for text in ("{", "[]", '{"format": "other", "version": 1}', '{"format": "adaptinfer-lmms-eval"}'):
        path.write_text(text)
        with pytest.raises(InputError, match="no record of this plug-in"):
            read_records(path)


def test_the_summary_compares_with_the_full_model() -> None:
    ours, full = TaskRecord([costs(64, 1e9)]), TaskRecord([costs(64, 4e9)])
    for number, (answer, expected) in enumerate([("Red.", "red"), ("blue", "green"), ("no", "no")]):
        ours.add_answer(number, answer)
        full.add_answer(number, expected)
    full.add_answer(9, "never asked")
    assert agreement(ours, full) == pytest.approx(2 / 3)
    assert agreement(TaskRecord(), full) is None
    (line,) = summary_lines({"pope": ours, "empty": TaskRecord()}, {"pope": full})
    assert line == (
        "pope: 32.0 of 64.0 vision tokens per layer, 1 GFLOPs, 1 MiB, prefill 5.0 ms, "
        "25 % of the full model's FLOPs, 66.7 % equal answers"
    )
    (line,) = summary_lines({"pope": ours}, {})
    assert "%" not in line


def test_local_tasks_have_data_and_metrics(tmp_path: Path) -> None:
    import datasets

    names = write_tasks(tmp_path, 9)
    assert names == list(TASKS)
    assert {path.stem for path in tmp_path.glob("*.yaml")} == {GROUP, *names}
    for name in names:
        table = datasets.load_from_disk(str(tmp_path / "data" / name))["test"]
        assert len(table) == 9
        for row in table:
            assert row["metric"] == TASKS[name].metric
            # A caption is longer than the one word that the question asks for.
            answer = row["references"][0] if row["metric"] == "rouge_l" else row["answer"]
            found = results(row, [answer])
            assert found[row["metric"]] == 1, row
            assert row["image"].size == (96, 96)
        text = (tmp_path / f"{name}.yaml").read_text()
        assert f"- metric: {TASKS[name].metric}\n" in text
        assert f"max_new_tokens: {TASKS[name].tokens}\n" in text
    assert {task.metric for task in TASKS.values()} == set(METRICS)


def test_options_of_a_choice_are_different_words_of_a_kind(tmp_path: Path) -> None:
    import datasets

    write_tasks(tmp_path, 12)
    table = datasets.load_from_disk(str(tmp_path / "data" / f"{GROUP}_choice"))["test"]
    letters = set()
    for row in table:
        assert len(set(row["options"])) == 4
        (letter,) = row["references"]
        letters.add(letter)
        assert row["options"][string.ascii_uppercase.index(letter)] == row["answer"]
    assert len(letters) > 1


def test_captions_hold_the_answer_and_one_word_of_them_scores_in_part(tmp_path: Path) -> None:
    import datasets

    write_tasks(tmp_path, 12)
    for row in datasets.load_from_disk(str(tmp_path / "data" / f"{GROUP}_caption"))["test"]:
        short, *others = row["references"]
        assert row["answer"] in short.split()
        assert all(short in other for other in others)
        position = row["question"].removesuffix("?").split()[-2:]
        assert others[-1].split()[-2:] == position
        assert results(row, [row["answer"]])["rouge_l"] == pytest.approx(0.6289, abs=1e-4)
        assert results(row, ["purple"])["rouge_l"] in (0, pytest.approx(0.6289, abs=1e-4))


def test_pairs_ask_for_yes_and_no_about_the_same_image(tmp_path: Path) -> None:
    import datasets

    write_tasks(tmp_path, 9)
    rows = list(datasets.load_from_disk(str(tmp_path / "data" / f"{GROUP}_pairs"))["test"])
    for one, other in zip(rows[:8:2], rows[1:8:2], strict=True):
        assert one["pair"] == other["pair"]
        assert one["image"] == other["image"]
        assert {one["answer"], other["answer"]} == {"yes", "no"}
    assert len({row["pair"] for row in rows}) == 5
    right = [results(row, [row["answer"]])["accuracy_plus"] for row in rows]
    yes = [results(row, ["yes"])["accuracy_plus"] for row in rows]
    assert accuracy_plus(right) == 1
    assert accuracy_plus(yes) == 0
    assert accuracy_plus(right[:6] + yes[6:]) == 3 / 4  # the ninth question has no pair
    assert accuracy_plus([]) == 0


@pytest.mark.parametrize(
    ("answer", "letter"), [("Blue.", "B"), ("(A)", "A"), ("D", "D"), ("white", "white"), ("", "")]
)
def test_an_option_is_chosen_by_its_text_or_letter(answer: str, letter: str) -> None:
    assert chosen_letter(answer, ["red", "blue", "green"]) == letter


def test_details_are_aggregated_over_a_task() -> None:
    row = {"metric": "yes_no", "references": ["no"], "options": []}
    judged = [results(row, ["yes"]), results(row | {"references": ["yes"]}, ["yes"])]
    assert [one["yes_no"] for one in judged] == [0, 1]
    assert precision([one["precision"] for one in judged]) == 0.5
    assert f1([one["f1"] for one in judged]) == pytest.approx(2 / 3)
