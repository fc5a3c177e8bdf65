"""Separators: learned vectors that a model puts among its image features to mark their layout.

LLaVA-NeXT, -OneVision, -NeXT-Video and Granite 4 Vision end each row of patches with one (`image_newline`) at the
id of an image token, so that ids do not tell them from content. They are found by value among the features that
the decoder is given instead.

Not found, and so ranked like content, are image newlines that pass through layers of their own on their way in
(Phi-4-multimodal, HunYuan-VL): their final value is nowhere in the model, and depends on the kernel's rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ImageNewline = tuple[nn.Module, str]
"""A learned vector: the module that owns it, and the parameter's name. An offloaded parameter is another
object every time its module runs, so it is looked up when it is needed."""

_ROUNDING = 2.0**-7
"""Largest difference from a image newline, as a fraction of its largest entry: under autocast it has been bfloat16."""


def find_image_newlines(model: PreTrainedModel, text_model: PreTrainedModel) -> tuple[ImageNewline, ...]:
    """The vectors as wide as the decoder that the modules around it own themselves; most models have none."""
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
    """True at the vision tokens that are image newlines, bool ``[batch, length]``; never waits for the device.

    Args:
        image newlines: from `find_image_newlines`.
        features: what the decoder is given at each position, ``[batch, length, width]``; several where
            it is given more than once.
        vision: bool ``[batch, length]``.
    """
    found = torch.zeros_like(vision)
    for owner, name in image_newlines:
        for given in features:
            vector = getattr(owner, name).detach().to(given.device, given.dtype)
            difference = (given.detach() - vector).abs_().amax(-1)
            found |= (difference <= _ROUNDING * vector.abs().amax()).to(vision.device)
    return found & vision
