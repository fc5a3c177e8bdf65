"""Attach a pruned prompt to the cache that holds its keys, and refuse the cache once the ``with`` has ended.

Every layer of a pruned cache has a length of its own, so a stock model computes wrong masks for it. The model is
clean by then; the refusal therefore lives on the cache, whose class becomes a subclass that checks before each use.
The subclass also says how many tokens the conversation has, and moves the prompt's rows with the cache's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from pruning_runtime.errors import PruningError
from pruning_runtime.sequence import PrunedPrompt


class Lease:
    """Whether the ``with`` that filled a cache is still open; shared by all its caches and their copies."""

    def __init__(self) -> None:
        self.is_open = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        return self


class _GuardedCache(Cache):
    """The checks; mixed into the cache's own class."""

    pruning_lease: Lease
    pruned_prompt: PrunedPrompt

    def _check(self) -> None:
        if not self.pruning_lease.is_open:
            raise PruningError(
                "this cache holds a pruned prompt and its `with pruned(...)` has ended; continue inside that `with`, "
                "or run the whole prompt again with a new cache"
            )

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._check()
        return super().update(*args, **kwargs)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Of a layer that is named, its own length; else that of the conversation, dropped tokens included.

        `generate` and decoders ask without a layer for how many tokens went before: the new ones' positions follow.
        """
        self._check()
        length = super().get_seq_length(*args, **kwargs)
        if args or kwargs or length == 0:
            return length
        # Without a layer, the cache's own class answers for the first one that has a length.
        first = next(index for index, layer in enumerate(self.layers) if isinstance(layer, CacheLayerMixin))
        return length + self.pruned_prompt.dropped_before(first)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        self._check()
        return super().get_mask_sizes(*args, **kwargs)

    def reorder_cache(self, beam_idx: Any) -> None:
        self.pruned_prompt.choose_rows(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.pruned_prompt.choose_rows(indices)
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.pruned_prompt.choose_rows(
            torch.arange(len(self.pruned_prompt.segments[0].index)).repeat_interleave(repeats)
        )


def attach_prompt(cache: Any, prompt: PrunedPrompt, lease: Lease) -> None:
    """Let ``cache`` carry ``prompt`` for later calls, and refuse its use when ``lease`` is closed."""
    cache.pruned_prompt, cache.pruning_lease = prompt, lease
    if not isinstance(cache, _GuardedCache):
        cache.__class__ = _guarded(type(cache))


def attached_prompt(cache: Any) -> PrunedPrompt | None:
    """The prompt that ``cache`` carries; None for a cache that was filled outside `pruned`."""
    return getattr(cache, "pruned_prompt", None)


def plain_type(cache: Any) -> type:
    """The class of ``cache`` before `attach_prompt` changed it."""
    return type(cache).__mro__[2] if isinstance(cache, _GuardedCache) else type(cache)


def _guarded(cache_type: type) -> type:
    """The guarded subclass of a cache class, with the same name."""
    if cache_type not in _guarded_types:
        _guarded_types[cache_type] = type(cache_type.__name__, (_GuardedCache, cache_type), {})
    return _guarded_types[cache_type]


_guarded_types: dict[type, type] = {}
