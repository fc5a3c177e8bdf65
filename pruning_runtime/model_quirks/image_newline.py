"""Image-newline tokens: learned vectors among the image features that mark the layout.

LLaVA-NeXT, -OneVision, -NeXT-Video and Granite 4 Vision end each row of patches with one (`image_newline`). It has the
id of an image token, so it is found by value among the features that the decoder receives.

Newlines that pass through further layers before the decoder (Phi-4-multimodal, HunYuan-VL) are not found and are ranked
like content: their final value is not stored in the model, and depends on the kernel's rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ImageNewline = tuple[nn.Module, str]
"""A learned vector: the module that owns it, and the parameter's name. The parameter is read when it is needed,
because an offloaded one is a new object each time its module runs."""

_ROUNDING = 2.0**-7
"""Tolerance as a fraction of the vector's largest entry: autocast rounds to bfloat16."""


def find_image_newlines(model: PreTrainedModel, text_model: PreTrainedModel) -> tuple[ImageNewline, ...]:
    """Parameters of the decoder's width that the modules around it own directly; most models have none."""
    width = text_model.config.hidden_size
    path = next(name for name, module in model.named_modules() if module is text_model).split(".")
    around = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    return tuple(
        (module, name)
        for module in around
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.shape == (width,)
    )


def image_newline_mask(
    image_newlines: Sequence[ImageNewline], features: Iterable[Tensor], vision: Tensor
) -> Tensor:
    """Vision tokens that are image newlines, bool ``[batch, length]``. Does not synchronize.

    Args:
        image_newlines: from `find_image_newlines`.
        features: inputs of the decoder, each ``[batch, length, width]``.
        vision: bool ``[batch, length]``.
    """
    found = torch.zeros_like(vision)
    for owner, name in image_newlines:
        for given in features:
            vector = getattr(owner, name).detach().to(given.device, given.dtype)
            difference = (given.detach() - vector).abs_().amax(-1)
            found |= (difference <= _ROUNDING * vector.abs().amax()).to(vision.device)
    return found & vision
