"""Where Python asks for a tensor's values: on a GPU each of these calls waits for all work queued so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from pruning_runtime import find_backbone, pruned
from tests.support.schedules import schedule_for
from tests.support.tiny_models import Inputs

# What Python calls; on a CPU some of these reach no operator.
_CALLS = {
    getattr(Tensor, name): name
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")
}
# What operators do of their own: shapes that depend on values, and reads behind `if` in composite operators.
_OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")
_INDEXING = ("index", "index_put", "index_put_", "_unsafe_index")

Read = tuple[str, str]
"""When, of a call of the whole model (``before`` the decoder, in the ``decoder``, ``after`` it), and what."""
PLAN: Counter[Read] = Counter({("before", "tolist"): 1})
"""What pruning itself reads: three counts per row, before the decoder."""


class _Calls(TorchFunctionMode):
    def __init__(self, reads: list[str]) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CALLS:
            self._reads.append(_CALLS[func])
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, reads: list[str]) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in _INDEXING and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in _OPERATORS or by_mask:
            self._reads.append(f"aten.{name}")
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads(model: PreTrainedModel) -> Iterator[Counter[Read]]:
    """Count the reads of the calls of ``model`` inside the ``with``."""
    counts: Counter[Read] = Counter()
    reads: list[str] = []

    def phase(name: str) -> Any:
        def hook(*_: Any) -> None:
            counts.update((name, read) for read in reads)
            reads.clear()

        return hook

    decoder = model.get_decoder()
    hooks = [
        decoder.register_forward_pre_hook(phase("before")),
        decoder.register_forward_hook(phase("decoder")),
        model.register_forward_hook(phase("after")),
    ]
    try:
        with _Calls(reads), _Operators(reads):
            yield counts
    finally:
        for hook in hooks:
            hook.remove()


def reads_of(model: PreTrainedModel, inputs: Inputs) -> tuple[Counter[Read], Counter[Read]]:
    """Reads of a prompt with all its logits, and of a prompt with two tokens generated behind it."""
    with torch.no_grad():
        with host_reads(model) as prompt:
            model(**inputs)
        with host_reads(model) as generated:
            model.generate(
                **inputs,
                max_new_tokens=3,
                min_new_tokens=3,
                do_sample=False,
                suppress_tokens=list(find_backbone(model).vision_token_ids),
            )
    return prompt, generated


def check_reads(model: PreTrainedModel, inputs: Inputs, *stages: tuple[int, float], **schedule: Any) -> None:
    """Compare the reads of pruned calls with those of the model itself."""
    unpruned = reads_of(model, inputs)
    with pruned(model, schedule_for(model, *stages, **schedule), keep_scores=True) as record:
        found = reads_of(model, inputs)
    assert [stage.layer for stage in record.stages] == [layer for layer, _ in stages]
    for more, fewer in zip(found, unpruned, strict=True):
        assert more - fewer == PLAN
