"""What a server with a setting refuses when it starts: one line each, from vLLM's own configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from pruning_runtime import Schedule, Stage
from pruning_runtime.schedule import BackboneIdentity, ScorerChoice

pytestmark = pytest.mark.slow

KEEP_HALF: dict[str, Any] = {"keep_ratio": 0.5}


def config_of(folder: Path, entry: Any = KEEP_HALF, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    overrides = {} if entry is None else {"adaptinfer": entry}
    return EngineArgs(
        model=str(folder), dtype="float32", hf_overrides=overrides, **options
    ).create_engine_config()


def schedule_file(path: Path, *stages: tuple[int, float], num_layers: int = 12, **fields: Any) -> str:
    Schedule(
        backbone=BackboneIdentity(name="demo", model_type="llava", num_layers=num_layers),
        stages=tuple(Stage(layer=layer, keep_ratio=ratio) for layer, ratio in stages),
        **{"scorer": ScorerChoice(name="divprune"), **fields},
    ).save(path)
    return str(path)


def test_a_schedule_that_fits_is_accepted(folders: dict[str, Path], tmp_path: Path) -> None:
    path = schedule_file(tmp_path / "s.json", (-1, 0.25))
    config = config_of(folders["llava"], {"schedule": path})
    assert config.model_config.uses_mrope  # original positions
    assert not config_of(folders["llava"], None).model_config.uses_mrope


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"enable_lora": True}, "LoRA adapters"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative decoding",
        ),
        ({"compilation_config": {"cudagraph_mm_encoder": True}}, "CUDA graphs of the vision encoder"),
        ({"video_pruning_rate": 0.5}, "vLLM's own video pruning"),
    ],
)
def test_options_that_pruning_does_not_work_with(
    folders: dict[str, Path], options: dict[str, Any], message: str
) -> None:
    family = "qwen" if "video_pruning_rate" in options else "llava"
    config_of(folders[family], None, **options)  # vLLM itself accepts it
    with pytest.raises(ValueError, match=f"adaptinfer cannot prune in vLLM with {message}"):
        config_of(folders[family], **options)


def test_videos_of_qwen3_vl_must_be_off(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="adaptinfer cannot prune in vLLM with videos of Qwen3-VL.*limit-mm"):
        config_of(folders["qwen3"])
    config_of(folders["qwen3"], limit_mm_per_prompt={"video": 0})


def test_model_runner_v2(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="model runner V2: not tested; set VLLM_USE_V2_MODEL_RUNNER=0"):
        config_of(folders["llava"])


@pytest.mark.parametrize(
    ("stages", "fields", "message"),
    [
        (((3, 0.5),), {}, "there is a stage at layer 3; find one with .*--for vllm"),
        (((-1, 0.5), (4, 0.2)), {}, "there is a stage at layer 4"),
        (((-1, 0.5),), {"dropped_tokens": "merge"}, "token sizes"),
        (((-1, 0.5),), {"positions": "renumbered"}, "positions: renumbered"),
        (((-1, 0.5),), {"scorer": ScorerChoice(name="mmtok")}, "'mmtok' reads the text"),
        (((-1, 0.5),), {"scorer": ScorerChoice(name="hiprune")}, "'hiprune' reads attention of the vision tower"),
        (((-1, 0.5),), {"num_layers": 32}, "num_layers is 12, the schedule was made for 32"),
    ],
)  # fmt: skip
def test_schedules_that_vllm_cannot_run(
    folders: dict[str, Path], tmp_path: Path, stages: Any, fields: dict[str, Any], message: str
) -> None:
    path = schedule_file(tmp_path / "s.json", *stages, **fields)
    with pytest.raises(ValueError, match=message):
        config_of(folders["llava"], {"schedule": path})


def test_other_families_are_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    other = shutil.copytree(folders["qwen"], tmp_path / "qwen2_vl")
    config = json.loads((other / "config.json").read_text())
    config["architectures"], config["model_type"] = ["Qwen2VLForConditionalGeneration"], "qwen2_vl"
    config["vision_config"] = {
        "depth": 1,
        "embed_dim": 64,
        "num_heads": 2,
        "hidden_size": 128,
        "patch_size": 14,
    }
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot prune Qwen2VLForConditionalGeneration in vLLM, only Llava"):
        config_of(other)
