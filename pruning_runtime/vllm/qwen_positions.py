"""Models with M-RoPE positions of Qwen's kind: every kept token carries its time, row and column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pruning_runtime.vllm.model import PruningModel
from pruning_runtime.vllm.positions import grid_positions, position_before

Grid = tuple[int, int, int, float]
"""Frames, rows, columns, and the distance of two frames in positions."""


class GridPositions(PruningModel):
    """Mixin before a model of Qwen's; a subclass says which grid an image or video has."""

    config: Any
    numbers_per_token = 3

    def grids(self, features: Sequence[Any]) -> Iterator[Grid]:
        """The grid of every image and video of a prompt, in order; ``features`` are vLLM's."""
        raise NotImplementedError

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Positions of a prompt; those of images and videos wait for the embeddings."""
        if not self.prunes:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        length = len(input_tokens)
        position, parts, start = 0, [], 0
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        for feature, (frames, rows, columns, step) in zip(features, self.grids(features), strict=True):
            offset, kept = feature.mm_position.offset, feature.mm_position.length
            parts.append(torch.arange(position, position + offset - start))
            position += offset - start
            parts.append(torch.full((kept,), position))
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
            return super().recompute_mrope_positions(  # type: ignore[misc]
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        vision_ids = [self.config.image_token_id, self.config.video_token_id]
        features, ids, slots, numbers = self.match_slots(
            input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens, vision_ids
        )
        positions = mrope_positions.clone()
        first = position_before(ids, vision_ids, positions[0], slots) + 1
        positions[:, slots] = first + numbers.T
        # A prompt ends with text, which has the highest position.
        return features, positions, int(positions[0, -1]) + 1 - len(ids)
