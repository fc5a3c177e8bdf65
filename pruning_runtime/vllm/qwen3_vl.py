"""Qwen3-VL in vLLM with fewer image tokens at their original M-RoPE positions; no videos.

An image token's embedding is followed by its DeepStack features, which the first decoder layers add. All columns of a
token stay or leave together; the scorer reads the embedding alone, as in the transformers runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen3_vl as qwen
from vllm.multimodal import MULTIMODAL_REGISTRY

from pruning_runtime.vllm.positions import grid_positions
from pruning_runtime.vllm.processing import PruningProcessor
from pruning_runtime.vllm.qwen_positions import Grid, GridPositions


class PrunedQwen3Processor(PruningProcessor, qwen.Qwen3VLMultiModalProcessor):
    """vLLM's processor with fewer placeholders."""

    def vision_token_ids(self) -> dict[str, int]:
        """See `PruningProcessor.vision_token_ids`."""
        return {"image": self.info.get_hf_config().image_token_id}

    def num_vision(self, modality: str, mm_items: Any, hf_inputs: Any) -> list[int]:
        """See `PruningProcessor.num_vision`."""
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        return (torch.as_tensor(hf_inputs["image_grid_thw"]).prod(-1) // merge**2).tolist()


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3Processor, info=qwen.Qwen3VLProcessingInfo, dummy_inputs=qwen.Qwen3VLDummyInputsBuilder
)
class PrunedQwen3VL(GridPositions, qwen.Qwen3VLForConditionalGeneration):
    """Qwen3-VL."""

    def scored(self, features: Tensor) -> Tensor:
        """See `PruningModel.scored`: without the DeepStack features."""
        return features[:, : self.visual_dim]

    def numbers(self, modality: str, item: int, count: int, fields: dict[str, Any]) -> Tensor:
        """See `PruningModel.numbers`."""
        merge = self.visual.spatial_merge_size
        _, rows, columns = torch.as_tensor(fields["image_grid_thw"])[item].tolist()
        return grid_positions(1, rows // merge, columns // merge, 1.0)

    def grids(self, features: Sequence[Any]) -> Iterator[Grid]:
        """See `GridPositions.grids`."""
        merge = self.config.vision_config.spatial_merge_size
        for feature in features:
            _, rows, columns = feature.data["image_grid_thw"].data.tolist()
            yield 1, rows // merge, columns // merge, 1.0
