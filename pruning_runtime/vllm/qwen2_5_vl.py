"""Qwen2.5-VL in vLLM with fewer image and video tokens at their original M-RoPE positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl as qwen
from vllm.multimodal import MULTIMODAL_REGISTRY

from pruning_runtime.vllm.model import PruningModel
from pruning_runtime.vllm.positions import grid_positions, position_before
from pruning_runtime.vllm.processing import PruningProcessor


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
class PrunedQwen25VL(PruningModel, qwen.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL; every kept token carries its time, row and column."""

    config: Any
    numbers_per_token = 3

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

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Positions of a prompt; those of images and videos wait for the embeddings."""
        if not self.prunes:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        length = len(input_tokens)
        position, parts, start = 0, [], 0
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        for feature, (offset, *sizes) in zip(features, self.iter_mm_grid_thw(features), strict=True):
            parts.append(torch.arange(position, position + offset - start))
            position += offset - start
            kept = feature.mm_position.length
            parts.append(torch.full((kept,), position))
            frames, rows, columns, step = sizes
            position += int(grid_positions(frames, rows, columns, step).max()) + 1
            start = offset + kept
        parts.append(torch.arange(position, position + length - start))
        after = position + length - start
        return torch.cat(parts).expand(3, -1).clone(), after - length

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Embeddings without their further columns, and the prompt's positions with those of the tokens of this step.

        An image follows a text token (its start mark), whose position is one less than the image's first.
        """
        if not self.prunes:
            return super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        vision_ids = [self.config.image_token_id, self.config.video_token_id]
        features, ids, slots, numbers = self.place(
            input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens, vision_ids
        )
        positions = mrope_positions.clone()
        first = position_before(ids, vision_ids, positions[0], slots) + 1
        positions[:, slots] = first + numbers.T
        # A prompt ends with text, which has the highest position.
        return features, positions, int(positions[0, -1]) + 1 - len(ids)
