"""Qwen2.5-VL in vLLM with fewer image and video tokens at their original M-RoPE positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl as qwen
from vllm.multimodal import MULTIMODAL_REGISTRY

from pruning_runtime.vllm.positions import grid_positions
from pruning_runtime.vllm.processing import PruningProcessor
from pruning_runtime.vllm.qwen_positions import Grid, GridPositions


class PrunedQwenProcessor(PruningProcessor, qwen.Qwen2_5_VLMultiModalProcessor):
    """vLLM's processor with fewer placeholders."""

    def vision_token_ids(self) -> dict[str, int]:
        """See `PruningProcessor.vision_token_ids`."""
        config = self.info.get_hf_config()
        return {"image": config.image_token_id, "video": config.video_token_id}

    def num_vision(self, modality: str, mm_items: Any, hf_inputs: Any) -> list[int]:
        """See `PruningProcessor.num_vision`."""
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        grids = torch.as_tensor(hf_inputs[f"{modality}_grid_thw"])
        return (grids.prod(-1) // merge**2).tolist()


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwenProcessor, info=qwen.Qwen2_5_VLProcessingInfo, dummy_inputs=qwen.Qwen2_5_VLDummyInputsBuilder
)
class PrunedQwen25VL(GridPositions, qwen.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""

    def numbers(self, modality: str, item: int, count: int, fields: dict[str, Any]) -> Tensor:
        """See `PruningModel.numbers`."""
        merge = self.visual.spatial_merge_size
        frames, rows, columns = torch.as_tensor(fields[f"{modality}_grid_thw"])[item].tolist()
        step = 1.0
        if modality == "video":
            seconds = fields.get("second_per_grid_ts")
            step = (1.0 if seconds is None else float(seconds[item])) * self._per_second
        return grid_positions(frames, rows // merge, columns // merge, step)

    @property
    def _per_second(self) -> float:
        return getattr(self.config.vision_config, "tokens_per_second", 1.0)

    def grids(self, features: Sequence[Any]) -> Iterator[Grid]:
        """See `GridPositions.grids`."""
        for _, frames, rows, columns, step in self.iter_mm_grid_thw(list(features)):
            yield frames, rows, columns, step
