"""Schedules that begin before the decoder, from what is measured to what is evaluated."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from transformers import PreTrainedModel
from typer.testing import CliRunner

from pruning_runtime import Schedule, find_backbone
from pruning_runtime.costs import budget_of, pre_decoder_share
from pruning_runtime.schedule import Stage
from schedule_finder.benchmark import run_benchmark
from schedule_finder.cli.commands import app
from schedule_finder.evaluation.evaluate import Evaluation
from schedule_finder.evaluation.methods import Method
from schedule_finder.models.loading import load_backbone
from schedule_finder.samples import choose_samples, open_data
from schedule_finder.search import measured_layers
from tests.support.answer_kls import POLICY, a_model_of, answer_kl_length, answer_kl_of
from tests.support.command_line import call
from tests.support.schedules import schedule_for
from tests.support.tiny_folder import write_jsonl, write_llava_folder
from tests.support.tiny_models import FAMILIES

LAYERS, VISION = 6, 16
LOOKING = ((-1, 0.5), (2, 0.25))


def looking_budget(model: PreTrainedModel, num_other: float) -> dict[str, float]:
    """What `LOOKING` costs by the accounting."""
    stages = [Stage(layer=layer, keep_ratio=ratio) for layer, ratio in LOOKING]
    return budget_of(stages, find_backbone(model).shape, VISION, num_other, pre_decoder=True).model_dump()


# ---- what is measured


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llava", [-1, 0, 1, 2, 3, 4]),
        ("gemma3n", None),  # its last layers share keys
        ("qwen3_5", None),  # recurrent layers come first
    ],
)
def test_the_first_place_is_before_the_decoder_where_layer_0_attends(
    name: str, expected: list[int] | None
) -> None:
    backbone = find_backbone(a_model_of(name)[0])
    places = measured_layers(backbone, "text_guided")
    if expected is not None:
        assert places == expected
    layers = [layer for layer in range(backbone.shape.num_layers - 1) if backbone.has_own_attention(layer)]
    assert places == ([-1, *layers] if backbone.has_own_attention(0) else layers)
    # Rules that read no attention can choose tokens before any decoder.
    assert measured_layers(backbone, "divprune") == measured_layers(backbone) == [-1, *layers]


def test_before_the_decoder_is_measured_as_a_whole_schedule_is_and_its_look_is_counted() -> None:
    tiny = FAMILIES["llava"]
    inputs = tiny.batch((1,))
    answer_kl = answer_kl_of(tiny.build(), [inputs])
    begun = answer_kl.forwards
    found = dict(answer_kl.measure_single([-1, 4], (0.5,), POLICY))
    single = answer_kl.forwards
    assert found[-1][0].tolist() == answer_kl.measure((Stage(layer=-1, keep_ratio=0.5),), POLICY).tolist()
    tokens = inputs["input_ids"].shape[1] + answer_kl_length(answer_kl)
    half = (tokens - VISION / 2) / tokens
    whole_schedule = half + pre_decoder_share(find_backbone(tiny.build()).shape) / LAYERS
    assert answer_kl.forwards - single == pytest.approx(whole_schedule)
    # Besides, the stage after layer 4 of 6, which runs first.
    assert single - begun == pytest.approx(whole_schedule + (LAYERS - 1 + half) / LAYERS)


# ---- a run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_folder(tmp_path_factory.mktemp("looks") / "llava")


@pytest.fixture(scope="module")
def tight(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a schedule below the cost of a first layer, which was evaluated; not to be changed."""
    folder = tmp_path_factory.mktemp("tight")
    data, out = write_jsonl(folder / "data", 20), folder / "run"
    asked = ("--samples", 16, "--eval-samples", 4, "--budget", "14%", "--baselines", "all", "--out", out)
    asked += ("--scorer", "text_guided")
    call("run", checkpoint, "--dataset", data, *asked)
    return out


def test_a_budget_below_a_layer_is_met_and_evaluated(tight: Path) -> None:
    schedule = Schedule.load(tight / "4_schedule.json")
    assert schedule.stages[0].layer == -1
    assert schedule.budget is not None
    assert schedule.budget.processed == pytest.approx(0.14, abs=1e-6)
    assert 1 / LAYERS > 0.14
    assert pd.read_parquet(tight / "4_sensitivity.parquet").layer.unique().tolist() == list(range(-1, 5))
    table = pd.read_csv(tight / "5_evaluation.csv").set_index("method")
    # Published shapes leave the first layer whole, which is more than there is; random layers need not.
    assert not {"paper", "pyramid"} & set(table.index)
    assert "random layers" in table.index
    # Whole tokens of sixteen, for each of six layers.
    assert table.processed["schedule"] == pytest.approx(0.14, abs=0.5 / VISION)
    assert table.processed["last_token"] == pytest.approx(table.processed["schedule"])
    # What needs no attention does not look.
    look = pre_decoder_share(find_backbone(a_model_of("llava")[0]).shape) / LAYERS
    assert table.processed["strided"] == pytest.approx(table.processed["schedule"] - look, abs=1e-6)
    assert table.flops["strided"] < table.flops["schedule"]
    assert (tight / "6_figures" / "4_schedule.png").exists()


def test_tables_say_that_tokens_leave_before_the_decoder(tight: Path) -> None:
    said = CliRunner().invoke(app, ["inspect", str(tight / "4_schedule.json")], env={"COLUMNS": "80"}).stdout
    assert "none: before the decoder" in said


def test_a_table_of_before_is_used_as_it_is(tight: Path, tmp_path: Path) -> None:
    """A run of a release that measured nothing before the decoder: no stage stands there, and nothing fails."""
    run = shutil.copytree(tight, tmp_path / "run")
    table = pd.read_parquet(run / "4_sensitivity.parquet")
    table[table.layer >= 0].to_parquet(run / "4_sensitivity.parquet", index=False)
    for options in (("--no-model",), ()):
        call("schedule", run, "--budget", "40%", *options)
        assert Schedule.load(run / "4_schedule.json").stages[0].layer >= 0
        line = call("schedule", run, "--budget", "14%", *options, code=2)
        assert "the first layer whole, which costs 0.167" in line
    call("plot", run)


# ---- what it costs


def test_an_evaluation_charges_the_look(checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_backbone(str(checkpoint), device="cpu")
    data = open_data(str(write_jsonl(tmp_path / "data", 3)), seed=0)
    samples = [data.load(entry) for entry in choose_samples(data, 2, 0, 0)]
    schedule = schedule_for(loaded.backbone.model, *LOOKING)
    costs = []
    for sample in samples:  # each alone: questions differ in length
        evaluation = Evaluation(loaded, [Method("schedule", schedule, 0.5)], max_new_tokens=1)
        evaluation.run_batch([sample])
        costs.append(evaluation.table().set_index("method").loc["schedule"])
    for sample, found in zip(samples, costs, strict=True):
        others = loaded.inputs([sample])["input_ids"].shape[1] - VISION
        expected = looking_budget(loaded.backbone.model, others)
        for count in ("processed", "published", "flops"):
            assert found[count] == pytest.approx(expected[count], abs=1e-9), count


def test_a_bench_charges_the_look() -> None:
    model, text = FAMILIES["llava"].build(), 11
    document = run_benchmark(
        find_backbone(model),
        schedule_for(model, *LOOKING),
        schedule_source="by hand",
        batches=(2,),
        lengths=(1,),
        num_text=text,
        rounds=3,
        seconds=1e6,
    )
    assert document["failed"] == []
    rows = {row["baseline"]: row for row in document["results"]}
    expected = looking_budget(model, text)
    look = pre_decoder_share(find_backbone(model).shape)
    assert rows["schedule"]["processed"] == pytest.approx(expected["processed"], abs=1e-9)
    assert rows["schedule"]["flops_ratio"] == pytest.approx(expected["flops"], abs=1e-9)
    assert rows["no-scoring bound"]["processed"] == pytest.approx(
        expected["processed"] - look / LAYERS, abs=1e-9
    )
    assert rows["no-scoring bound"]["flops_ratio"] < expected["flops"]
