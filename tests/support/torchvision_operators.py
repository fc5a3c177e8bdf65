"""Lets torchvision's CUDA wheel import beside a CPU build of torch: its two operators are declared before.

`make test-vllm` copies this file into its environment, where a .pth file imports it in every process: vLLM starts
processes of its own, which tests/conftest.py does not reach.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

DECLARED: list[Any] = []


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing; declares the operators at the first import of torchvision."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.cuda.is_available() or hasattr(torch.ops.torchvision, "nms"):
            return
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        DECLARED.append(library)


sys.meta_path.insert(0, BeforeTorchvision())
