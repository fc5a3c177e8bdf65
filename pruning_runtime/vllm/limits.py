"""What a server with a setting cannot be combined with, and what it needs of vLLM's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pruning_runtime.errors import ScheduleError, UnsupportedBackbone
from pruning_runtime.schedule import Schedule
from pruning_runtime.vllm.setting import ENTRY, server_schedule, server_setting

OPEN_GATE = 1e-18
"""A rate of vLLM's own video pruning so small that it drops nothing. vLLM asks a model for recomputed positions only if
this rate is above 0."""


def entry_of(hf_config: Any) -> Mapping[str, Any] | None:
    """The server's setting as given in ``hf_overrides``; None on a server that does not prune."""
    return getattr(hf_config, ENTRY, None)


def prepare_server(config: Any, architectures: Sequence[str]) -> None:
    """Check a server's configuration (``VllmConfig``) and add what original positions need; nothing without a setting.

    Raises `ScheduleError` for a setting that vLLM cannot run, `UnsupportedBackbone` for a model or an option of vLLM that
    pruning does not work with.
    """
    hf_config = config.model_config.hf_config
    entry = entry_of(hf_config)
    if entry is None:
        return
    architecture = config.model_config.architecture
    if architecture not in architectures:
        raise UnsupportedBackbone(
            f"adaptinfer cannot prune {architecture} in vLLM, only {', '.join(architectures)}; remove {ENTRY!r} from "
            "hf_overrides, or use transformers"
        )
    if getattr(hf_config.vision_config, "model_type", None) == "pixtral":
        raise UnsupportedBackbone(
            f"adaptinfer cannot prune {architecture} with a Pixtral vision tower in vLLM, whose images contain break "
            f"tokens; remove {ENTRY!r} from hf_overrides, or use transformers"
        )
    server_setting(entry)
    if (schedule := server_schedule(entry)) is not None:
        check_backbone(schedule, hf_config)
    if (conflict := conflict_with(config)) is not None:
        raise UnsupportedBackbone(f"adaptinfer cannot prune in vLLM with {conflict}")
    if not config.model_config.uses_mrope:
        # vLLM then keeps positions per request, as it does for M-RoPE. The decoder's own configuration stays.
        hf_config.mrope_section = [1, 1, 1]


def check_backbone(schedule: Schedule, hf_config: Any) -> None:
    """Raise `ScheduleError` unless the schedule is for a backbone of this family and depth."""
    wanted = schedule.backbone
    found = {
        "model_type": hf_config.model_type,
        "num_layers": hf_config.get_text_config().num_hidden_layers,
    }
    differences = [
        f"{field} is {value!r}, the schedule was made for {getattr(wanted, field)!r}"
        for field, value in found.items()
        if getattr(wanted, field) != value
    ]
    if differences:
        raise ScheduleError(
            f"schedule for {wanted.name!r} does not fit the served model: {'; '.join(differences)}. Profile this model, "
            "or load the schedule that belongs to it"
        )


def conflict_with(config: Any) -> str | None:
    """The first option of vLLM that pruning does not work with, and what to do; None where there is none."""
    multimodal = config.model_config.multimodal_config
    videos = config.model_config.hf_config.model_type == "qwen3_vl" and (
        multimodal is None or multimodal.get_limit_per_prompt("video") > 0
    )
    conflicts = {
        "videos of Qwen3-VL, whose frames are apart in the prompt; add --limit-mm-per-prompt '{\"video\": 0}'": videos,
        "speculative decoding: the draft model would get other positions; remove --speculative-config": (
            config.speculative_config is not None
        ),
        "pipeline parallelism: not tested; use --tensor-parallel-size": (
            config.parallel_config.pipeline_parallel_size > 1
        ),
        "LoRA adapters: vLLM counts their image tokens without pruning; remove --enable-lora": (
            config.lora_config is not None
        ),
        "CUDA graphs of the vision encoder: they bypass the selection; set cudagraph_mm_encoder to false": bool(
            config.compilation_config.cudagraph_mm_encoder
        ),
        "vLLM's own video pruning: use the schedule for videos too; remove --video-pruning-rate": bool(
            multimodal is not None and multimodal.video_pruning_rate
        ),
        "model runner V2: not tested; set VLLM_USE_V2_MODEL_RUNNER=0": bool(config.use_v2_model_runner),
    }
    return next((text for text, found in conflicts.items() if found), None)
