"""What hooks and patches would leave on a model."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def state_of(model: nn.Module) -> list[Any]:
    """Everything that hooks and patches could have changed, for every module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return [
        (
            name,
            [list(getattr(module, kind)) for kind in hooks],
            "forward" in vars(module),
            sorted(vars(module)),
        )
        for name, module in model.named_modules()
    ] + [
        sorted(ALL_ATTENTION_FUNCTIONS),
        sorted(ALL_MASK_ATTENTION_FUNCTIONS),
        model.config._attn_implementation,
        model.get_decoder().config._attn_implementation,
        model.config.to_dict(),
    ]
