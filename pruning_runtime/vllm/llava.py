"""LLaVA-1.5 in vLLM with fewer image tokens at their original positions.

vLLM keeps positions per request for M-RoPE models only, as three rows. LLaVA's decoder has one position per token: it is
the first row. The second holds the position of the image's first token, the third the first position after the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModalPruning
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageEmbeddingItems

from pruning_runtime.vllm.model import PruningModel
from pruning_runtime.vllm.processing import PruningProcessor, tokens_field

NEW_TOWER_NAMES = WeightsMapper(
    orig_to_new_prefix={
        f"vision_tower.{part}": f"vision_tower.vision_model.{part}"
        for part in ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
    }
)
"""Tensors of a CLIP tower in checkpoints that transformers 5.2 or newer saved; vLLM 0.32 knows the older names only."""


class LlavaTokens(PruningProcessor):
    """Counts the image tokens of LLaVA's families."""

    def vision_token_ids(self) -> dict[str, int]:
        """See `PruningProcessor.vision_token_ids`."""
        return {"image": self.info.get_hf_config().image_token_index}

    def num_vision(self, modality: str, mm_items: Any, hf_inputs: Any) -> list[int]:
        """See `PruningProcessor.num_vision`."""
        images = mm_items[modality]
        if isinstance(images, ImageEmbeddingItems):
            return [images.get_feature_size(item) for item in range(len(images))]
        sizes = [images.get_image_size(item) for item in range(len(images))]
        return [
            self.info.get_num_image_tokens(image_width=size.width, image_height=size.height) for size in sizes
        ]


class OnePositionPerToken(PruningModel):
    """Models whose decoder has one position per token, and whose images are one run of vision tokens each."""

    config: Any
    numbers_per_token = 1

    def numbers(self, modality: str, item: int, count: int, fields: dict[str, Any]) -> Tensor:
        """See `PruningModel.numbers`: the token's index in its image."""
        return torch.arange(count)[:, None]

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The parent's, with the row of positions that the decoder reads."""
        return super().forward(input_ids, positions[0] if self.prunes else positions, *args, **kwargs)  # type: ignore[misc]

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Rows of positions as in this file's docstring; at images the first row waits for the embeddings."""
        length, dropped = len(input_tokens), 0
        positions = torch.arange(length).expand(3, -1).clone()
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            start, kept = feature.mm_position.offset, feature.mm_position.length
            positions[:2, start : start + kept] = positions[0, start].clone()
            fewer = int(feature.data[tokens_field("image")].data) - kept
            positions[:, start + kept :] += fewer
            dropped += fewer
        positions[2] = length + dropped
        return positions, dropped

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Embeddings without their further columns, and the prompt's positions with those of the tokens of this step."""
        features, ids, slots, index = self.match_slots(
            input_ids,
            multimodal_embeddings,
            mrope_positions,
            num_computed_tokens,
            [self.config.image_token_index],
        )
        positions = mrope_positions.clone()
        positions[0, slots] = positions[1, slots] + index[:, 0]
        return features, positions, int(positions[2, 0]) - len(ids)


class PrunedLlavaProcessor(LlavaTokens, llava.LlavaMultiModalProcessor):
    """vLLM's processor with fewer placeholders."""


def _processor(info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
    """Models with a Pixtral tower keep vLLM's own."""
    if isinstance(info, llava.LlavaProcessingInfo):
        return PrunedLlavaProcessor(info, dummy_inputs, **kwargs)
    return llava._build_llava_or_pixtral_hf_processor(info, dummy_inputs, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(
    _processor, info=llava._build_llava_or_pixtral_hf_info, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class PrunedLlava(
    OnePositionPerToken, llava.LlavaForConditionalGeneration, SupportsMRoPE, SupportsMultiModalPruning
):
    """LLaVA-1.5."""

    hf_to_vllm_mapper = llava.LlavaForConditionalGeneration.hf_to_vllm_mapper | NEW_TOWER_NAMES
