"""Replaces vLLM's classes by those that can prune, and checks settings when a server starts."""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm import ModelRegistry
from vllm.config import VllmConfig

from pruning_runtime.vllm.limits import prepare_server

CLASSES = {
    "LlavaForConditionalGeneration": "pruning_runtime.vllm.llava:PrunedLlava",
    "LlavaNextForConditionalGeneration": "pruning_runtime.vllm.llava_next:PrunedLlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "pruning_runtime.vllm.qwen2_5_vl:PrunedQwen25VL",
    "Qwen3VLForConditionalGeneration": "pruning_runtime.vllm.qwen3_vl:PrunedQwen3VL",
}
"""Architecture -> class. Names only: importing model code in every process of vLLM may initialize CUDA too early."""

_MARK = "adaptinfer_checks_settings"


def register_classes() -> None:
    """May be called more than once in a process."""
    for architecture, path in CLASSES.items():
        ModelRegistry.register_model(architecture, path)
    _check_settings()
    _open_gate_on_cpu()


def _check_settings() -> None:
    """Let every server's configuration pass `prepare_server`."""
    plain = VllmConfig.try_verify_and_update_config
    if hasattr(plain, _MARK):
        return

    @wraps(plain)
    def try_verify_and_update_config(self: VllmConfig) -> None:
        model = self.model_config
        # vLLM copies a checked configuration for the decoder inside a model; the copy is not a server's.
        if model is not None and not getattr(model, "config_updated", False):
            prepare_server(self, tuple(CLASSES))
        plain(self)

    setattr(try_verify_and_update_config, _MARK, True)
    VllmConfig.try_verify_and_update_config = try_verify_and_update_config


def _open_gate_on_cpu() -> None:
    """Let vLLM 0.32's CPU runner ask models for recomputed positions, as its GPU runner does after loading."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    plain = CPUModelRunner.load_model
    if hasattr(plain, _MARK):
        return

    @wraps(plain)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if getattr(self.model, "prunes", False):
            self.is_multimodal_pruning_enabled = True

    setattr(load_model, _MARK, True)
    CPUModelRunner.load_model = load_model
