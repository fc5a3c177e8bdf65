"""The published schedules that ship with the runtime cost what the papers print."""

from __future__ import annotations

import json

import pytest

from pruning_runtime import Schedule
from pruning_runtime.costs import budget_of, processed_ratios, published_ratios
from pruning_runtime.geometry import DecoderShape
from pruning_runtime.schedule import PRESET_FOLDER

NAMES = (
    "adaptinfer/llava-1.5-13b-128",
    "adaptinfer/llava-1.5-13b-64",
    "adaptinfer/llava-1.5-7b-128",
    "adaptinfer/llava-1.5-7b-32",
    "adaptinfer/llava-1.5-7b-48",
    "adaptinfer/llava-1.5-7b-64",
    "adaptinfer/qwen2-vl-2b-10",
    "adaptinfer/qwen2-vl-2b-30",
    "adaptinfer/qwen2-vl-2b-50",
    *(f"cdpruner/llava-1.5-7b-{kept}" for kept in (128, 32, 64)),
    *(f"divprune/llava-1.5-7b-{kept}" for kept in (128, 192, 32, 64)),
    "fastv/llava-1.5-7b",
    *(f"hiprune/llava-1.5-7b-{kept}" for kept in (128, 192, 64)),
    *(f"mmtok/llava-1.5-7b-{kept}" for kept in (128, 192, 64)),
    "pyramiddrop/llava-1.5-7b",
    "sparsevlm-plus/llava-1.5-7b-128",
    "sparsevlm-plus/llava-1.5-7b-192",
    "sparsevlm-plus/llava-1.5-7b-64",
    "sparsevlm-plus/llava-1.5-7b-96",
    "sparsevlm/llava-1.5-7b-128",
    "sparsevlm/llava-1.5-7b-192",
    "sparsevlm/llava-1.5-7b-64",
    "sparsevlm/llava-1.5-7b-96",
    *(f"visionzip/llava-1.5-7b-{kept}" for kept in (128, 192, 64)),
    *(f"vscan/llava-1.5-7b-{kept}" for kept in (128, 192, 64)),
)

BEFORE_THE_DECODER = ("cdpruner", "divprune", "mmtok", "hiprune", "visionzip")

# Mean vision tokens per layer of 576, processed and by the published count, to the printed digit.
MEAN_TOKENS = {
    "adaptinfer/llava-1.5-7b-128": (146.3, 128.8),
    "adaptinfer/llava-1.5-7b-64": (82.9, 65.0),
    "adaptinfer/llava-1.5-7b-48": (66.7, 48.8),
    "adaptinfer/llava-1.5-7b-32": (51.0, 33.0),
    "sparsevlm/llava-1.5-7b-192": (202.8, 188.2),
    "sparsevlm/llava-1.5-7b-128": (140.8, 123.9),
    "sparsevlm/llava-1.5-7b-96": (110.3, 93.1),
    "sparsevlm/llava-1.5-7b-64": (79.2, 61.7),
    "sparsevlm-plus/llava-1.5-7b-192": (206.8, 192.4),
    "sparsevlm-plus/llava-1.5-7b-128": (144.1, 128.0),
    "sparsevlm-plus/llava-1.5-7b-96": (113.9, 96.8),
    "sparsevlm-plus/llava-1.5-7b-64": (81.8, 64.4),
    "fastv/llava-1.5-7b": (306.0, 297.0),
    "vscan/llava-1.5-7b-64": (64.0, 62.0),
}
# The same as percentages, where the number of vision tokens depends on the image.
# (1 + 9 * 0.17 + 10 * 0.102 + 8 * 0.0306) / 28 = 13.553 %.
MEAN_PERCENT = {
    "adaptinfer/qwen2-vl-2b-10": (13.6, 10.1),
    "adaptinfer/qwen2-vl-2b-30": (32.9, 29.7),
    "adaptinfer/qwen2-vl-2b-50": (54.0, 51.1),
}
# (layer, tokens kept of 576) as published; a stage's tokens leave after its layer.
KEPT = {
    "adaptinfer/llava-1.5-7b-128": [(1, 290), (10, 72), (20, 18)],
    "adaptinfer/llava-1.5-7b-64": [(1, 133), (10, 27), (20, 3)],
    "adaptinfer/llava-1.5-7b-48": [(1, 80), (10, 24), (20, 2)],
    "adaptinfer/llava-1.5-7b-32": [(1, 40), (10, 12), (20, 0)],
    "adaptinfer/llava-1.5-13b-128": [(1, 300), (10, 94), (20, 30)],
    "adaptinfer/llava-1.5-13b-64": [(1, 148), (10, 40), (20, 5)],
    "fastv/llava-1.5-7b": [(1, 288)],
    "pyramiddrop/llava-1.5-7b": [(7, 288), (15, 144), (23, 72)],
    "sparsevlm/llava-1.5-7b-192": [(2, 300), (6, 200), (15, 110)],
    "sparsevlm/llava-1.5-7b-128": [(2, 303), (6, 110), (15, 36)],
    "sparsevlm/llava-1.5-7b-96": [(2, 238), (6, 48), (15, 26)],
    "sparsevlm/llava-1.5-7b-64": [(2, 66), (6, 30), (15, 17)],
    "sparsevlm-plus/llava-1.5-7b-192": [(2, 300), (6, 200), (15, 118)],
    "sparsevlm-plus/llava-1.5-7b-128": [(2, 238), (6, 108), (15, 60)],
    "sparsevlm-plus/llava-1.5-7b-96": [(2, 246), (6, 54), (15, 28)],
    "sparsevlm-plus/llava-1.5-7b-64": [(2, 66), (6, 34), (15, 20)],
    # 1.5 times the published count enter the decoder, half of it is left after its middle.
    "vscan/llava-1.5-7b-192": [(-1, 288), (15, 96)],
    "vscan/llava-1.5-7b-128": [(-1, 192), (15, 64)],
    "vscan/llava-1.5-7b-64": [(-1, 96), (15, 32)],
    **{name: [(-1, int(name.rsplit("-")[-1]))] for name in NAMES if name.startswith(BEFORE_THE_DECODER)},
}
SHAPES = {
    "llava-hf/llava-1.5-7b-hf": DecoderShape(32, 4096, 32, 32, 128, 11008, 32064),
    "llava-hf/llava-1.5-13b-hf": DecoderShape(40, 5120, 40, 40, 128, 13824, 32064),
    "Qwen/Qwen2-VL-2B-Instruct": DecoderShape(28, 1536, 12, 2, 128, 8960, 151936),
}
# Families whose own code numbers kept tokens anew; the others keep the original positions.
RENUMBERED = ("adaptinfer/llava", "sparsevlm/", "pyramiddrop/", "vscan/", *BEFORE_THE_DECODER)
SCORERS = {
    "adaptinfer": "text_guided",
    "fastv": "last_token",
    "pyramiddrop": "last_token",
    "sparsevlm": "sparsevlm",
    "sparsevlm-plus": "sparsevlm",
    "vscan": "last_token",
    **{name: name for name in BEFORE_THE_DECODER},
}


def means(schedule: Schedule) -> tuple[float, float]:
    """Mean fraction of vision tokens over layers: processed, published."""
    layers = schedule.backbone.num_layers
    return tuple(
        sum(count(schedule.stages, layers)) / layers for count in (processed_ratios, published_ratios)
    )


def test_every_preset_is_listed() -> None:
    assert Schedule.presets() == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_loads_and_saves_to_the_same_text(name: str) -> None:
    schedule = Schedule.preset(name)
    assert schedule.to_json() == (PRESET_FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert schedule == Schedule.from_json(schedule.to_json())


@pytest.mark.parametrize("name", MEAN_TOKENS)
def test_mean_tokens_are_the_printed_ones(name: str) -> None:
    found = [576 * ratio for ratio in means(Schedule.preset(name))]
    # Half a unit of the last printed digit.
    assert found == pytest.approx(MEAN_TOKENS[name], abs=0.05 + 1e-9)


@pytest.mark.parametrize("name", MEAN_PERCENT)
def test_mean_percentages_are_the_printed_ones(name: str) -> None:
    found = [100 * ratio for ratio in means(Schedule.preset(name))]
    assert found == pytest.approx(MEAN_PERCENT[name], abs=0.05 + 1e-9)


@pytest.mark.parametrize("name", KEPT)
def test_a_576_token_image_keeps_the_published_counts(name: str) -> None:
    stages = Schedule.preset(name).stages
    assert [(stage.layer, stage.kept(576)) for stage in stages] == KEPT[name]
    stated = [stage.keep_tokens for stage in stages]
    counts_were_published = not name.startswith(("fastv", "pyramiddrop"))
    assert stated == ([kept for _, kept in KEPT[name]] if counts_were_published else [None] * len(stages))


@pytest.mark.parametrize(
    ("percent", "relative"), [(10, (0.17, 0.6, 0.3)), (30, (0.5, 0.6, 0.3)), (50, (0.7, 0.9, 0.3))]
)
def test_qwen_ratios_are_relative_to_the_original_tokens(percent: int, relative: tuple[float, ...]) -> None:
    stages = Schedule.preset(f"adaptinfer/qwen2-vl-2b-{percent}").stages
    assert [stage.layer for stage in stages] == [0, 9, 19]
    before = 1.0
    for stage, ratio in zip(stages, relative, strict=True):
        before *= ratio
        assert stage.keep_ratio == pytest.approx(before, abs=1e-12)


def test_pyramiddrop_processes_the_270_tokens_that_its_paper_counts() -> None:
    processed, _ = means(Schedule.preset("pyramiddrop/llava-1.5-7b"))
    assert 576 * processed == 270


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_states_rule_positions_source_and_cost(name: str) -> None:
    schedule = Schedule.preset(name)
    assert schedule.scorer.name == SCORERS[name.split("/")[0]]
    assert schedule.positions == ("renumbered" if name.startswith(RENUMBERED) else "original")
    # The papers' code ranks every vision token.
    assert schedule.image_newlines == "ranked"
    assert {"source", "published", "flops_prompt", "note"} <= schedule.evidence.keys()
    # The file fits any checkpoint of its family and depth.
    assert schedule.backbone.config_digest is None
    prompt = schedule.evidence["flops_prompt"]
    expected = budget_of(
        schedule.stages,
        SHAPES[schedule.backbone.name],
        prompt["vision_tokens"],
        prompt["other_tokens"],
        kind=schedule.budget.kind,
        target=schedule.budget.target,
        scorer=schedule.scorer.name,
    )
    assert schedule.budget.model_dump() == pytest.approx(expected.model_dump())


@pytest.mark.parametrize("name", NAMES)
def test_the_budget_s_target_is_the_published_number(name: str) -> None:
    budget, published = Schedule.preset(name).budget, Schedule.preset(name).evidence["published"]
    if "mean_kept_percent" in published:
        assert (budget.kind, budget.target) == ("published", published["mean_kept_percent"] / 100)
    elif "kept_tokens" in published:
        assert (budget.kind, budget.target) == ("published", published["mean_kept_tokens"] / 576)
    else:
        # FastV and PyramidDrop publish rules, not a count of ours.
        assert (budget.kind, budget.target) == ("processed", budget.processed)


def test_preset_files_are_plain_json_that_anyone_may_read() -> None:
    for name in NAMES:
        path = PRESET_FOLDER / f"{name}.json"
        json.loads(path.read_text(encoding="utf-8"))
        assert path.stat().st_mode & 0o044 == 0o044
