"""vLLM's models with fewer vision tokens: the part that encodes images, and gives kept tokens their positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pruning_runtime.errors import PruningError
from pruning_runtime.vllm.limits import OPEN_GATE, entry_of
from pruning_runtime.vllm.positions import LARGEST, computed_slots, split_numbers, with_numbers
from pruning_runtime.vllm.processing import setting_field, setting_in, tokens_field
from pruning_runtime.vllm.selection import kept_indices


class PruningModel:
    """Mixin before a model of vLLM. Without a setting of the server, every method is vLLM's own.

    Attributes:
        prunes: whether the server has a setting.
        numbers_per_token: numbers that say where a kept token is inside its image.
    """

    prunes: bool
    numbers_per_token: int

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.prunes = entry_of(vllm_config.model_config.hf_config) is not None
        if self.prunes:
            # After the parent's constructor, so that the parent does not prune videos itself.
            vllm_config.model_config.multimodal_config.video_pruning_rate = OPEN_GATE

    def numbers(self, modality: str, item: int, count: int, fields: dict[str, Any]) -> Tensor:
        """Where every token of an image or video is inside it, on the host, long ``[count, numbers_per_token]``.

        Args:
            modality: ``image`` or ``video``.
            item: its number in the batch.
            count: its tokens before pruning.
            fields: of the batch, as the parent's ``embed_multimodal`` gets them.
        """
        raise NotImplementedError

    def scored(self, features: Tensor) -> Tensor:
        """The columns of ``features`` (``[tokens, width]``) that scorers read: what enters the first decoder layer."""
        return features

    def protected(self, features: Tensor) -> Tensor | None:
        """Image-newline tokens among ``features`` (``[tokens, width]``); None for families without them."""
        return None

    def embed_multimodal(self, **fields: Any) -> Any:
        """Embeddings of the kept tokens of each item; a batch holds images or videos, not both."""
        if not self.prunes:
            return super().embed_multimodal(**fields)  # type: ignore[misc]
        modality = "video" if setting_field("video") in fields else "image"
        settings = [setting_in(field) for field in fields.pop(setting_field(modality))]
        fields.pop(tokens_field(modality))
        found = []
        for item, features in enumerate(super().embed_multimodal(**fields)):  # type: ignore[misc]
            setting = settings[item]
            protected = self.protected(features) if setting.image_newlines == "protected" else None
            kept = kept_indices(self.scored(features), setting.kept(len(features)), setting.rule(), protected)
            numbers = self.numbers(modality, item, len(features), fields)
            if int(numbers.max()) > LARGEST:
                raise PruningError(
                    f"adaptinfer: positions inside a {modality} reach {int(numbers.max())}, above {LARGEST}; send a shorter "
                    "video or a smaller image"
                )
            found.append(with_numbers(features[kept], numbers.to(features.device)[kept]))
        return tuple(found)

    def match_slots(
        self,
        input_ids: Any,
        embeddings: Sequence[Tensor],
        positions: Tensor,
        first: int,
        vision_ids: list[int],
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Split embeddings and numbers, and find the slots of the prompt that they belong to.

        Returns:
            ``(embeddings, ids of the prompt, slots, numbers)``; the last three on the device of ``positions``.
        """
        ids = torch.as_tensor(input_ids, device=positions.device)
        pairs = [split_numbers(one, self.numbers_per_token) for one in embeddings]
        empty = torch.zeros(0, self.numbers_per_token, dtype=torch.long)
        numbers = torch.cat([number for _, number in pairs] or [empty]).to(positions.device)
        slots = computed_slots(ids, vision_ids, first, len(numbers))
        return [features for features, _ in pairs], ids, slots, numbers
