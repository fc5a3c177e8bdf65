"""The device of the tests in `tests/gpu`: a GPU, or what GPU_TESTS_ON names."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.tiny_models import FAMILIES

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
ON_GPU = DEVICE == "cuda"
GPU_MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no CUDA device"),
]


def build(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A small instance on the device. Weights are drawn on the CPU, so that they are the same everywhere."""
    return FAMILIES[family].build(**options).to(DEVICE, dtype)
