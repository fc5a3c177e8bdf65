"""Peak memory of a run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak number of bytes allocated on ``device`` during ``call``, minus those allocated before."""
    if device.type == "cuda":
        gc.collect()  # garbage of earlier calls must not count
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as live:
        call()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that operations created inside; workspaces of kernels are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._seen: WeakSet[torch.UntypedStorage] = WeakSet()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                size = storage.nbytes()
                finalize(storage, self._gone, size)
                self._now += size
                self.peak = max(self.peak, self._now)
        return made

    def _gone(self, size: int) -> None:
        self._now -= size
