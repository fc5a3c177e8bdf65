"""Videos through the commands, for three families of video models: profile, detect, schedule, evaluate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pruning_runtime import find_backbone, pruned
from pruning_runtime.schedule import ScorerChoice
from schedule_finder.errors import InputError
from schedule_finder.models.checkpoint import _one_line
from schedule_finder.models.loading import LoadedBackbone, load_backbone
from schedule_finder.profiling.store import ProfileStore
from schedule_finder.samples import SampleEntry, open_data
from tests.support import greedy
from tests.support.command_line import call
from tests.support.masked_reference import dropped_positions
from tests.support.own_mask_reference import append_tokens, own_mask_logits
from tests.support.rounding import rounding_bound
from tests.support.schedules import schedule_for
from tests.support.tiny_folder import write_video_jsonl
from tests.support.tiny_models import Inputs
from tests.support.tiny_video_folders import VIDEO_FOLDERS, write_video_folder

FRAMES = 4
# Vision tokens of four frames: two pairs of frames of 4 x 4 tokens, or frames of 2 x 2, to which LLaVA-OneVision adds an
# image-newline token at the end.
TOKENS = {"qwen2_5_vl": 2 * 16, "llava_onevision": 4 * 4 + 1, "llava_next_video": 4 * 4}
FRAME_TOKENS = {"qwen2_5_vl": 16, "llava_onevision": 4, "llava_next_video": 4}
RULES = ("strided", "text_guided", "evs", "vidcom2")


@pytest.mark.parametrize("family", VIDEO_FOLDERS)
def test_the_commands_take_videos(family: str, tmp_path: Path) -> None:
    checkpoint, videos = (
        write_video_folder(tmp_path / family, family),
        write_video_jsonl(tmp_path / "clips", 9),
    )
    out = tmp_path / "run"
    options = ("--dataset", videos, "--frames", FRAMES, "--samples", 4, "--eval-samples", 3, "--out", out)
    assert call("profile", checkpoint, *options)["done"] == 4
    assert ProfileStore(out / "2_profile").read().mean_vision == TOKENS[family]
    call("detect", out)
    call("schedule", out, "--budget", 0.6, "--solver", "paper")
    call("evaluate", out, "--max-new-tokens", 2, "--baselines", "random,strided,evs,vidcom2", "--no-sweep")
    compared = json.loads((out / "5_evaluation.json").read_text())["methods"]
    assert compared.keys() >= {"full", "schedule", "random", "strided", "evs", "vidcom2"}


def test_without_torchvision_one_line_says_what_to_install() -> None:
    """transformers' video processors need it; its message has an address and no command."""
    missing = "LlavaNextVideoVideoProcessor requires the Torchvision library but it was not found."
    with (
        pytest.raises(InputError, match=r"'a': its video processor needs torchvision.*'adaptinfer\[video\]'"),
        _one_line("a", offline=False),
    ):
        raise ImportError(missing)


@pytest.mark.slow
@pytest.mark.parametrize("family", VIDEO_FOLDERS)
def test_a_whole_run_on_videos(family: str, tmp_path: Path) -> None:
    """Every step with its defaults, the measurements of the search and the viewer among them."""
    checkpoint, videos = (
        write_video_folder(tmp_path / family, family),
        write_video_jsonl(tmp_path / "clips", 9),
    )
    out = tmp_path / "run"
    call(
        "run",
        checkpoint,
        "--dataset",
        videos,
        "--frames",
        FRAMES,
        "--samples",
        4,
        "--eval-samples",
        3,
        "--out",
        out,
    )
    steps = json.loads((out / "run.json").read_text())["steps"]
    assert {step["state"] for step in steps.values()} == {"done"}


@pytest.fixture(scope="module", params=VIDEO_FOLDERS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def prompts(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedBackbone, Inputs]:
    """Two clips of a file and their questions, as the family's processor and the commands make them."""
    folder = tmp_path_factory.mktemp(family)
    loaded = load_backbone(str(write_video_folder(folder / "model", family)))
    data = open_data(str(write_video_jsonl(folder / "clips", 2)), frames=FRAMES)
    first, second = (data.load(SampleEntry(str(row), data.source, row, "held_out")) for row in range(2))
    samples = [first, replace(second, question="what ?")]  # padded on the left
    inputs = loaded.inputs(samples)
    assert not inputs["attention_mask"].all()
    return loaded, inputs


@pytest.mark.parametrize("rule", RULES)
def test_pruned_videos_of_a_file_equal_masking(
    family: str, prompts: tuple[LoadedBackbone, Inputs], rule: str
) -> None:
    loaded, inputs = prompts
    model = loaded.backbone.model
    options = {"frame_tokens": FRAME_TOKENS[family]} if rule in ("evs", "vidcom2") else {}
    schedule = schedule_for(model, (1, 0.5), (3, 0.25))
    first, second = schedule.stages
    chosen = ScorerChoice(name=rule, options=options)
    schedule = schedule.model_copy(update={"stages": (first.model_copy(update={"scorer": chosen}), second)})
    with pruned(model, schedule) as record:
        tokens, logits = greedy.generate(model, inputs, steps=4)
    assert list(record.num_vision) == [TOKENS[family]] * 2
    vision = find_backbone(model).vision_mask(inputs["input_ids"])
    gone = [
        (stage.layer + 1, dropped_positions(inputs, vision, stage.kept_positions()))
        for stage in record.stages
    ]
    expected = own_mask_logits(model, inputs, tokens, gone, extend=append_tokens)
    assert (logits - expected).abs().max() < rounding_bound(model, inputs)
    unpruned = own_mask_logits(model, inputs, tokens, [], extend=append_tokens)
    assert (logits - unpruned).abs().amax((1, 2)).min() > 0.05
