"""DeepStack: vision features that are added to the hidden states between decoder layers.

The model adds them with a mask over the full sequence, which does not fit after tokens were dropped. In a pruned
prefill these arguments of the decoder are removed, spread over the full sequence once, and added before each layer to
the tokens that are left. Stock models use two forms:

- Qwen3-VL: ``visual_pos_masks`` ``[batch, length]`` and ``deepstack_visual_embeds``, a list whose entry ``i``
  is added *after* layer ``i``.
- Granite 4 Vision: ``vision_mask`` ``[batch, length, 1]`` and ``deepstack_features``, a dictionary whose
  entry ``i`` is added *before* layer ``i``, any layer, the first included.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def take_features(arguments: dict[str, Any], hidden: Tensor) -> dict[int, Tensor]:
    """Remove DeepStack's arguments and return the features to add, by decoder layer.

    Args:
        arguments: keyword arguments of the decoder, changed in place.
        hidden: the decoder's input embeddings, ``[batch, length, width]``.

    Returns:
        Features ``[batch, length, width]`` to add before each layer, zero at other tokens than vision tokens; empty
        for other families and for prompts without vision. Features after the last layer have its index plus one.
    """
    if arguments.get("deepstack_visual_embeds") is not None:
        mask, after = arguments.pop("visual_pos_masks"), arguments.pop("deepstack_visual_embeds")
        before = {layer + 1: features for layer, features in enumerate(after)}
    elif arguments.get("deepstack_features") is not None:
        mask, before = arguments.pop("vision_mask"), arguments.pop("deepstack_features")
    else:
        return {}
    positions = mask.view(*hidden.shape[:2], 1).to(hidden.device)
    return {
        layer: hidden.new_zeros(hidden.shape).masked_scatter(
            positions, features.to(hidden.device, hidden.dtype)
        )
        for layer, features in before.items()
    }
