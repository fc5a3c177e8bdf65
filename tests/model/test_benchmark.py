"""The bench on small instances: what belongs to whom, never how long anything took."""

from __future__ import annotations

import csv
import json
import re
import statistics
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from typer.testing import CliRunner

from pruning_runtime import PruningError, find_backbone, pruned
from schedule_finder.benchmark import DECODE_PARTS, PREFILL_PARTS, choose_schedule, run_benchmark
from schedule_finder.benchmark.clock import PartClock
from schedule_finder.benchmark.one_run import Bench
from schedule_finder.benchmark.report import table
from schedule_finder.cli.commands import app
from schedule_finder.cli.terminal.benchmark import benchmark_rows, show_benchmark
from schedule_finder.errors import InputError
from schedule_finder.figures.benchmark import latency
from schedule_finder.models.loading import load_backbone, load_to_measure
from schedule_finder.models.shapes import PREFIX, RANDOM_WEIGHTS, build_shape, shapes
from schedule_finder.models.synthetic_inputs import synthetic_inputs
from tests.support.hidden_packages import FINDER_ONLY, run_with_hidden
from tests.support.schedules import schedule_for
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_folder import write_llava_folder
from tests.support.tiny_models import FAMILIES

CPU = torch.device("cpu")
BASELINES = ["unpruned", "schedule", "no-scoring bound", "eager, syncs", "FastV-like", "before decoder"]
FAST = ["unpruned, fast", "schedule, fast"]
BATCHES, LENGTHS, TEXT = (1, 2), (1, 3), 11


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """A whole bench of a small LLaVA, with the fast path, which runs uncaptured here."""
    model = FAMILIES["llava"].build()
    return run_benchmark(
        find_backbone(model),
        schedule_for(model, (0, 0.5), (3, 0.25), positions="renumbered"),
        schedule_source="by hand",
        batches=BATCHES,
        lengths=LENGTHS,
        num_text=TEXT,
        rounds=4,
        seconds=1e6,
        fast=True,
    )


def test_the_parts_of_every_round_add_up_to_its_total(measured: dict[str, Any]) -> None:
    assert [(result["batch"], result["baseline"]) for result in measured["results"]] == [
        (batch, name) for batch in BATCHES for name in BASELINES + FAST
    ]
    assert measured["failed"] == []
    for result in measured["results"]:
        assert [row["new_tokens"] for row in result["rounds"]] == [3, 3, 3, 1]
        for row in result["rounds"]:
            assert set(row["parts"]["prefill"]) <= set(PREFILL_PARTS)
            assert set(row["parts"]["decode"]) <= set(DECODE_PARTS)
            total = sum(sum(phase.values()) for phase in row["parts"].values())
            assert total == pytest.approx(row["total_ms"], rel=1e-9)
            assert min(value for phase in row["parts"].values() for value in phase.values()) >= 0
        # Each part that this baseline has was seen; on the fast path what stages add is not told apart.
        had = {part for part, spent in result["prefill"].items() if spent}
        scored = result["baseline"] in ("schedule", "eager, syncs", "FastV-like")
        dropped = result["baseline"] != "unpruned" and not result["fast"]
        assert had == set(PREFILL_PARTS) - (set() if scored else {"scoring"}) - (
            set() if dropped else {"dropping"}
        )
        untold = {part for part, spent in result["prefill"].items() if spent is None}
        assert untold == ({"scoring", "dropping"} if result["fast"] else set())


def test_each_baseline_is_compared_with_the_unpruned_model_on_its_path(measured: dict[str, Any]) -> None:
    def decoder(baseline: str, batch: int) -> list[float]:
        (found,) = [
            one["rounds"]
            for one in measured["results"]
            if (one["baseline"], one["batch"]) == (baseline, batch)
        ]
        prefills = [row["parts"]["prefill"] for row in found]
        return [sum(parts.get(part, 0) for part in ("decoder", "scoring", "dropping")) for parts in prefills]

    for result in measured["results"]:
        name, batch = result["baseline"], result["batch"]
        against = {
            "decoder_ratio": "unpruned",
            "same_path_ratio": "unpruned, fast" if name in FAST else "unpruned",
        }
        for field, baseline in against.items():
            ratios = [a / b for a, b in zip(decoder(name, batch), decoder(baseline, batch), strict=True)]
            assert result[field]["median"] == pytest.approx(statistics.median(ratios))


def test_oracle_and_ours_process_the_same_tokens(measured: dict[str, Any]) -> None:
    for batch in BATCHES:
        by_name = {one["baseline"]: one for one in measured["results"] if one["batch"] == batch}
        assert by_name["unpruned"]["tokens_per_layer"] == [16 + TEXT] * 6
        ours = by_name["schedule"]
        assert ours["tokens_per_layer"] == [16 + TEXT] + [8 + TEXT] * 3 + [4 + TEXT] * 2
        for name in ("no-scoring bound", "eager, syncs", "schedule, fast"):
            for field in ("tokens_per_layer", "cache_bytes", "processed", "flops_ratio", "roofline_ms"):
                assert by_name[name][field] == ours[field]
        # Keys and values of two heads of eight numbers each, in float32.
        assert ours["cache_bytes"] == batch * sum(ours["tokens_per_layer"]) * 2 * 2 * 8 * 4
        assert ours["processed"] == pytest.approx(48 / 96)
        assert min(one["peak_bytes"] for one in by_name.values()) > 0
        for field in ("tokens_per_layer", "cache_bytes", "processed", "flops_ratio", "roofline_ms"):
            assert by_name["unpruned, fast"][field] == by_name["unpruned"][field]


def test_baselines_see_the_same_inputs_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["qwen2_vl"].build()
    prompts: list[torch.Tensor] = []
    pixels: list[list[torch.Tensor]] = []

    def note_prompt(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] > 1:
            prompts.append(kwargs["input_ids"])

    def note_pixels(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        pixels.append([value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)])

    model.register_forward_pre_hook(note_prompt, with_kwargs=True)
    model.model.visual.register_forward_pre_hook(note_pixels, with_kwargs=True)
    order: list[str] = []
    run = Bench.run
    monkeypatch.setattr(
        Bench, "run", lambda self, one, length: (order.append(one.name), run(self, one, length))[1]
    )
    schedule = schedule_for(model, (1, 0.25))
    run_benchmark(find_backbone(model), schedule, lengths=(1,), num_vision=24, rounds=4, seconds=1e6)
    assert len(prompts) == len(pixels) == len(order) == 5 * len(BASELINES)  # memory, then four rounds
    assert (prompts[0] == model.config.image_token_id).sum() == 24
    assert len(pixels[0]) == 2  # patches and their grid
    for other in prompts:
        assert torch.equal(other, prompts[0])
    for others in pixels:
        assert all(torch.equal(one, two) for one, two in zip(others, pixels[0], strict=True))
    rounds = [order[at : at + len(BASELINES)] for at in range(len(BASELINES), len(order), len(BASELINES))]
    assert rounds == [BASELINES[turn:] + BASELINES[:turn] for turn in range(4)]


def test_the_fast_path_is_taken_once_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llava"].build()
    prefills: list[tuple[str, bool]] = []
    running: list[str] = []
    clocks: list[PartClock] = []
    made = PartClock.on

    def on(device: torch.device) -> PartClock:
        clocks.append(made(device))
        return clocks[-1]

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["inputs_embeds"].shape[1] > 1:
            prefills.append((running[-1], clocks[-1].running))

    monkeypatch.setattr(PartClock, "on", on)
    model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    document = run_benchmark(
        find_backbone(model), schedule_for(model, (1, 0.25)), lengths=(1,), rounds=3, fast=True,
        before_run=running.append,
    )  # fmt: skip
    assert document["failed"] == []
    for name in BASELINES + FAST:
        timed = [clock for one, clock in prefills if one == name]
        assert timed == ([False, True] * 4 if name in FAST else [True] * 4), name


def test_a_baseline_that_fails_is_left_out_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """A rule that draws on the host runs on the plain path, which is not what is to be measured."""
    model = FAMILIES["llava"].build()
    schedule = schedule_for(model, (1, 0.25), scorer="random")
    document = run_benchmark(find_backbone(model), schedule, lengths=(1, 2), rounds=3, seconds=0, fast=True)
    (failed,) = document["failed"]
    assert (failed["batch"], failed["baseline"]) == (1, "schedule, fast")
    assert "scorer 'random' draws on the host" in failed["reason"]
    assert [result["baseline"] for result in document["results"]] == [*BASELINES, "unpruned, fast"]
    assert len(table(document)) == len(latency(document)[1]) == len(BASELINES) + 1
    show_benchmark(document)
    assert (
        "left out: batch 1, schedule, fast: RuntimeError: fast=True: scorer 'random'"
        in capsys.readouterr().out
    )


def test_tables_and_figure_say_what_a_captured_graph_hides(
    measured: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for speed, parts in benchmark_rows(measured).values():
        assert [row[0] for row in speed] == [*BASELINES, *FAST, "roofline"]
        assert {row[0]: row.count("*") for row in parts} == {
            name: 2 if name in FAST else 0 for name in BASELINES + FAST
        }
    show_benchmark(measured)
    said = " ".join(capsys.readouterr().out.split())
    assert "path: in % of unpruned on the same path" in said
    assert "*: included in layers: a captured graph cannot be divided" in said
    figure, drawn = latency(measured)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == [" scoring, dropping\n in the decoder"] * len(BATCHES)
    for axes in figure.axes[1::2]:
        assert [line.get_label() for line in axes.lines] == BASELINES + FAST
    assert drawn["scoring_ms"].isna().sum() == len(FAST) * len(BATCHES)


def test_without_the_unpruned_fast_path_only_its_ratio_is_missing() -> None:
    model = FAMILIES["llava"].build()
    document = run_benchmark(
        find_backbone(model), schedule_for(model, (1, 0.25)), lengths=(1,), rounds=3, seconds=0, fast=True,
        without=["unpruned, fast", "no-scoring bound"],
    )  # fmt: skip
    by_name = {result["baseline"]: result for result in document["results"]}
    assert set(document["baselines"]) == set(by_name) == {*BASELINES, "schedule, fast"} - {"no-scoring bound"}
    assert by_name["schedule, fast"]["same_path_ratio"] is None
    assert by_name["schedule, fast"]["decoder_ratio"]["median"] > 0


def test_what_a_bench_is_about_cannot_be_left_out() -> None:
    model = FAMILIES["llava"].build()
    schedule = schedule_for(model, (1, 0.25))
    with pruned(model, schedule), pytest.raises(PruningError, match="already inside"):
        run_benchmark(find_backbone(model), schedule, lengths=(1,), rounds=3)


def test_where_time_is_up_one_round_decodes(capsys: pytest.CaptureFixture[str]) -> None:
    model = FAMILIES["llava"].build()
    document = run_benchmark(
        find_backbone(model), schedule_for(model, (1, 0.25)), lengths=(1, 4), rounds=15, seconds=0
    )
    for result in document["results"]:
        assert [row["new_tokens"] for row in result["rounds"]] == [4, 1, 1]
        assert sum(result["decode"].values()) == pytest.approx(3 * result["token_ms"]["median"])
    show_benchmark(document)
    assert "3 rounds, 1 of them with 4 new tokens" in " ".join(capsys.readouterr().out.split())


def test_the_model_is_left_as_it_was() -> None:
    model = FAMILIES["llava"].build()
    with torch.inference_mode():
        model(**FAMILIES["llava"].batch((1,)))  # transformers puts in hooks of its own at a first call
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    before = {name: [copy(vars(module)[field]) for field in hooks] for name, module in model.named_modules()}
    configs = {name: vars(module).get("config") for name, module in model.named_modules()}
    run_benchmark(find_backbone(model), schedule_for(model, (1, 0.25)), lengths=(1, 2), rounds=3, seconds=0)
    for name, module in model.named_modules():
        assert [vars(module)[field] for field in hooks] == before[name], name
        assert vars(module).get("config") is configs[name], name
    assert model.get_decoder().config._attn_implementation == "sdpa"


def test_a_bench_needs_none_of_the_finder_s_packages() -> None:
    """A machine with a GPU may have torch and transformers only."""
    code = """
HIDDEN.discard("schedule_finder")
import torch
from pruning_runtime import find_backbone
from schedule_finder.benchmark import run_benchmark
from tests.support.schedules import schedule_for
from tests.support.tiny_models import FAMILIES

torch.set_num_threads(1)
model = FAMILIES["llava"].build()
document = run_benchmark(find_backbone(model), schedule_for(model, (1, 0.25)), lengths=(1, 2), rounds=3, seconds=0)
print(len(document["results"]), sorted(HIDDEN & {name.partition(".")[0] for name in sys.modules}))
"""
    done = run_with_hidden(code, FINDER_ONLY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{len(BASELINES)} []"


# ---- the command


def test_what_is_printed_stands_in_the_files(tmp_path: Path) -> None:
    checkpoint, out = write_llava_folder(tmp_path / "llava"), tmp_path / "bench"
    schedule = tmp_path / "schedule.json"
    loaded = load_to_measure(str(checkpoint), device="cpu")
    schedule_for(loaded.model, (1, 0.5), (3, 0.25)).save(schedule)
    result = CliRunner().invoke(
        app,
        ["bench", str(checkpoint), "--schedule", str(schedule), "--device", "cpu", "--lengths", "1,2", "--batch", "2,1",
         "--rounds", "3", "--seconds", "0", "--out", str(out), "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {
        "bench.json", "bench.csv", "latency.pdf", "latency.png", "latency.csv",
    }  # fmt: skip
    document = json.loads((out / "bench.json").read_text())
    assert json.loads(result.stdout.strip().splitlines()[-1]) == document
    printed = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()]
    for shown in benchmark_rows(document).values():
        for rows in shown:
            for row in rows:
                assert [cell for cell in row if cell] in printed
    rows = list(csv.DictReader((out / "bench.csv").open()))
    assert [row["baseline"] for row in rows] == BASELINES * 2
    for row, found in zip(rows, document["results"], strict=True):
        assert float(row["decoder_ms"]) == found["decoder_ms"]["median"]
        assert float(row["total_ms_2"]) == found["total_ms"]["2"]["median"]
    assert document["schedule"]["stages"] == [[1, 8], [3, 4]]
    assert document["note"] is None
    environment = document["environment"]
    assert {"torch", "transformers"} <= set(environment["versions"])
    assert {"created", "source", "python", "machine", "device_name", "cuda"} <= set(environment)
    assert [environment[field] for field in ("device", "dtype", "threads")] == [
        "cpu",
        "float32",
        torch.get_num_threads(),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shape:llava-2"], "known: shape:llava-1.5-7b"),
        (["shape:llava-tiny", "--batch", "1,x"], "--batch '1,x'"),
        (["shape:llava-tiny", "--lengths", "0"], "--lengths '0'"),
        (["shape:llava-tiny", "--schedule", "nowhere.json"], "nowhere.json"),
        (["shape:llava-tiny", "--vision-tokens", "100"], "makes 576"),
        (["shape:llava-tiny", "--text-tokens", "1"], "at least 4"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments, "--device", "cpu"])
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert message in line


@pytest.mark.parametrize(
    "command", [["run", "shape:llava-tiny", "--dataset", "demo"], ["inspect", "shape:llava-tiny"]]
)
def test_other_commands_refuse_shapes(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert RANDOM_WEIGHTS in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="bench"):
        load_backbone("shape:llava-tiny")


# ---- shapes


@pytest.mark.parametrize("name", shapes())
def test_a_shape_has_as_many_parameters_as_published(name: str) -> None:
    settings = dict(shapes()[name]["config"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    billions = sum(weights.numel() for weights in model.parameters()) / 1e9
    assert round(billions, 2) == shapes()[name]["billion_parameters"]
    backbone = find_backbone(model)
    schedule, _ = choose_schedule(None, replace(backbone, name=PREFIX + name))
    schedule.check_backbone(backbone)


def test_a_shape_is_built_where_and_as_asked() -> None:
    model = build_shape("shape:llava-tiny", CPU, torch.bfloat16)
    assert {weights.dtype for weights in model.parameters()} == {torch.bfloat16}
    again = build_shape("shape:llava-tiny", CPU, torch.bfloat16)
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one.dim() == 1 or 0.015 < one.float().std() < 0.025, name
    backbone = find_backbone(model)
    assert backbone.name == "shape:llava-tiny"
    inputs = synthetic_inputs(backbone, 1)
    assert inputs["input_ids"].shape == (1, 576 + 88)
    with torch.inference_mode():
        logits = model(**inputs, logits_to_keep=1).logits
    assert logits.isfinite().all()
    # The same table as a stock model's, whose buffers are no parameters and so are not drawn.
    stock = AutoModelForImageTextToText.from_config(model.config)
    for name, buffer in stock.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name


@pytest.mark.parametrize(
    ("family", "num_vision"),
    [("llava", None), ("qwen2_vl", 24), ("qwen2_5_vl", 7), ("qwen3_vl", 24), ("llava_next", None)],
)
def test_prompts_have_the_tokens_asked_for(family: str, num_vision: int | None) -> None:
    tiny: Any = FAMILIES.get(family) or FAMILIES_A[family]
    model = tiny.build()
    backbone = find_backbone(model)
    inputs = synthetic_inputs(backbone, 3, num_vision, 10)
    vision = backbone.vision_mask(inputs["input_ids"])
    counts = vision.sum(1).tolist()
    assert len(set(counts)) == 1
    assert num_vision is None or counts[0] == num_vision
    assert inputs["input_ids"].shape == (3, counts[0] + 10)
    assert not vision[:, :2].any()
    assert not vision[:, -2:].any()
    with torch.inference_mode():
        assert model(**inputs).logits.isfinite().all()  # as many features as vision tokens, or it raises
    again = synthetic_inputs(backbone, 3, num_vision, 10)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)


def test_families_without_known_inputs_are_refused() -> None:
    backbone = find_backbone(FAMILIES_A["internvl"].build())
    with pytest.raises(InputError, match="'internvl'"):
        synthetic_inputs(backbone, 1)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_every_family_runs_every_baseline_in_bfloat16(family: str) -> None:
    """Eager stages, DeepStack, image newlines and M-RoPE, in the precision of a GPU."""
    tiny: Any = FAMILIES.get(family) or FAMILIES_A[family]
    model = tiny.build().to(torch.bfloat16)
    schedule = schedule_for(model, (1, 0.5), (3, 0.25), positions="renumbered")
    document = run_benchmark(
        find_backbone(model), schedule, lengths=(1, 2), num_text=TEXT, rounds=3, seconds=0
    )
    assert [result["baseline"] for result in document["results"]] == BASELINES
    assert document["environment"]["dtype"] == "bfloat16"
    ours, no_scoring_bound, eager = document["results"][1:4]
    assert ours["tokens_per_layer"] == no_scoring_bound["tokens_per_layer"] == eager["tokens_per_layer"]
