"""The parts of vLLM that this plug-in builds on: one release, and the signatures of the methods that it replaces."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

RELEASE = (0, 32)

BASE_SIGNATURES = {
    "BaseMultiModalProcessor._apply_hf_processor_main": ("self", "mm_items", "hf_kwargs"),
    "BaseMultiModalProcessor._get_mm_fields_config": ("self", "hf_inputs", "hf_processor_mm_kwargs"),
    "BaseMultiModalProcessor._get_prompt_updates": (
        "self", "mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs",
    ),
    "BaseMultiModalProcessor._get_mm_hashes": ("self", "inputs"),
    "SupportsMultiModalPruning.recompute_mrope_positions": (
        "self", "input_ids", "multimodal_embeddings", "mrope_positions", "num_computed_tokens",
    ),
    "SupportsMRoPE.get_mrope_input_positions": ("self", "input_tokens", "mm_features"),
    "VllmConfig.try_verify_and_update_config": ("self",),
    "MultiModalConfig.is_multimodal_pruning_enabled": ("self",),
}  # fmt: skip
"""Parameters of each method in `RELEASE`, by class and name."""


def problem_of_installed() -> str | None:
    """Why the installed vLLM cannot be used; None where it can."""
    import vllm

    if (problem := problem_of_release(vllm.__version_tuple__)) is not None:
        return problem
    from vllm.config import MultiModalConfig, VllmConfig
    from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModalPruning
    from vllm.multimodal.processing import BaseMultiModalProcessor

    owners = (BaseMultiModalProcessor, SupportsMultiModalPruning, SupportsMRoPE, VllmConfig, MultiModalConfig)
    return problem_of_signatures({owner.__name__: owner for owner in owners}, BASE_SIGNATURES)


def problem_of_release(version: tuple[Any, ...]) -> str | None:
    """Why a release of vLLM cannot be used; None where it can."""
    if tuple(version[:2]) == RELEASE:
        return None
    found = ".".join(map(str, version[:3]))
    return f"it supports vLLM {RELEASE[0]}.{RELEASE[1]} only, and {found} is installed"


def problem_of_signatures(owners: Mapping[str, type], expected: Mapping[str, tuple[str, ...]]) -> str | None:
    """The first method of ``expected`` (``Class.method``) that is missing or has other parameters; None if all fit."""
    for path, parameters in expected.items():
        owner, _, name = path.partition(".")
        method: Callable[..., Any] | None = getattr(owners[owner], name, None)
        if method is None:
            return f"this build of vLLM has no {path}"
        found = tuple(inspect.signature(method).parameters)
        if found != parameters:
            return f"{path} of this build of vLLM has the parameters {found}, expected {parameters}"
    return None
