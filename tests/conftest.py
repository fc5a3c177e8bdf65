"""Shared set-up: thread count, and a torchvision that imports beside a CPU build of torch."""

from __future__ import annotations

import importlib.util
import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

# torchvision's wheels are CUDA builds: beside a CPU build of torch its compiled operators do not load,
# its import fails, and every processor of transformers with it. Declaring the two operators that it
# registers fakes for lets the import through; nothing here calls them. The environment of tests/vllm does so itself.
if (
    importlib.util.find_spec("torchvision")
    and not torch.cuda.is_available()
    and not hasattr(torch.ops.torchvision, "nms")
):
    _torchvision = torch.library.Library("torchvision", "DEF")
    _torchvision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_configure() -> None:
    """Let failed assertions of `tests.support` say what they compared, as those of test modules do."""
    import pytest  # here, because plain processes import this module, too

    pytest.register_assert_rewrite("tests.support")
