"""DeepStack: vision features that are added to the hidden states between decoder layers (Qwen3-VL).

The model adds them with a mask over the full sequence, which no longer fits once tokens have left. While
a prompt is pruned its two arguments are taken away, spread over the full sequence once, and added after
each of the first layers to the tokens that are there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_MASK, _FEATURES = "visual_pos_masks", "deepstack_visual_embeds"


def take_features(arguments: dict[str, Any], hidden: Tensor) -> list[Tensor]:
    """Remove DeepStack's arguments and return its features, ``[batch, length, width]`` per layer.

    Args:
        arguments: keyword arguments of the decoder; changed in place.
        hidden: the decoder's input embeddings, ``[batch, length, width]``.
    """
    mask, features = arguments.pop(_MASK, None), arguments.pop(_FEATURES, None)
    if mask is None or features is None:
        return []
    place = mask[..., None].to(hidden.device)
    return [
        hidden.new_zeros(hidden.shape).masked_scatter(place, layer.to(hidden.device, hidden.dtype))
        for layer in features
    ]
