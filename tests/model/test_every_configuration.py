"""`find_backbone` on every image-text class of transformers: it finds the parts, or refuses by name."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from pruning_runtime import UnsupportedBackbone, find_backbone

CONFIGURATIONS = {config.__name__: config for config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}
FOUND = (
    "LlavaConfig",
    "Qwen3_5MoeConfig",
    "Qwen3VLMoeConfig",
    "Gemma4Config",
    "Kimi_K25Config",
    "AriaConfig",
)


def build(name: str) -> PreTrainedModel | None:
    """The default configuration without memory; None where transformers itself cannot build it."""
    found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIGURATIONS[name]]
    model_class = found[0] if isinstance(found, tuple) else found
    try:
        with torch.device("meta"):
            return model_class(CONFIGURATIONS[name]())
    except Exception:  # a default configuration may name packages or sizes that do not go together
        return None


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_backbone_is_found_or_refused_by_name(name: str) -> None:
    model = build(name)
    if model is None:
        assert name not in FOUND
        return
    try:
        backbone = find_backbone(model)
    except UnsupportedBackbone as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert name not in FOUND
        assert type(model).__name__ in refusal
        return
    shape = backbone.shape
    assert shape.linear_flops is not None
    whole = [2 * sum(weight.numel() for weight in layer.parameters()) for layer in backbone.layers]
    for flops, every in zip(shape.linear_flops, whole, strict=True):
        assert 0 < flops < 1.3 * every
    assert shape.intermediate_size > 0
    assert 0 < shape.scoring_flops < max(shape.linear_flops)
