"""LLaVA-NeXT in vLLM with fewer image tokens at their original positions."""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.models import llava, llava_next
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModalPruning
from vllm.multimodal import MULTIMODAL_REGISTRY

from pruning_runtime.vllm.llava import NEW_TOWER_NAMES, LlavaTokens, OnePositionPerToken
from pruning_runtime.vllm.selection import newline_mask


class PrunedLlavaNextProcessor(LlavaTokens, llava_next.LlavaNextMultiModalProcessor):
    """vLLM's processor with fewer placeholders."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextProcessor,
    info=llava_next.LlavaNextProcessingInfo,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class PrunedLlavaNext(
    OnePositionPerToken,
    llava_next.LlavaNextForConditionalGeneration,
    SupportsMRoPE,
    SupportsMultiModalPruning,
):
    """LLaVA-NeXT, whose images contain image-newline tokens."""

    hf_to_vllm_mapper = llava_next.LlavaNextForConditionalGeneration.hf_to_vllm_mapper | NEW_TOWER_NAMES

    image_newline: Tensor

    def protected(self, features: Tensor) -> Tensor:
        """See `PruningModel.protected`."""
        return newline_mask(features, self.image_newline)
