"""Tokens after a pruned prompt, generated or of a later turn: every layer gets the mask of its own keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pruning_runtime.errors import PruningError
from pruning_runtime.prefill import LayerArguments
from pruning_runtime.sequence import PrunedPrompt, once
from pruning_runtime.setup import PruningSetup


@dataclass
class Continuation:
    """One call with tokens after a pruned prompt.

    Attributes:
        setup: of the ``with``.
        prompt: the positions that each layer holds.
        attention_mask: of the whole conversation, ``[batch, length]``, or None.
        made: masks and rotary tables of this call; layers with the same segment share them.
    """

    setup: PruningSetup
    prompt: PrunedPrompt
    attention_mask: Tensor | None
    made: dict[Any, Any] = field(default_factory=dict)

    def before_layer(
        self, layer: int, hidden: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> LayerArguments | None:
        """Replace the mask of ``layer``; arguments and result as of `Prefill.before_layer`."""
        prompt, backbone = self.prompt, self.setup.backbone
        if len(prompt.segments) == 1 or not backbone.attends(layer):
            return None
        queries = hidden.shape[-2]
        prompt.later_turns |= queries > 1
        source = backbone.kv_sources[layer]
        # Read from the cache at the source layer's first use, before it adds the new keys: cropped caches (assisted
        # decoding) are right too. Layers that share keys may get fewer queries than their source.
        generated, num_keys, new = once(
            self.made, ("cache", source), lambda: self._cache_state(source, queries, kwargs)
        )
        # At the first attention layer; a hybrid may begin with recurrent layers.
        if not any(map(backbone.attends, range(layer))):
            self._check_call(hidden, generated)
        segment = prompt.segment_of_layer[layer]
        span = self.setup.masks.spans[layer]
        kwargs = dict(kwargs)
        kwargs["attention_mask"] = once(
            self.made,
            ("mask", segment, prompt.segment_of_layer[source], span, num_keys, queries),
            lambda: self._mask(layer, generated + new, num_keys, hidden),
        )
        if self.setup.renumbering is not None and segment > 0:
            made = self.made.setdefault(("renumbered", segment), {})
            positions = once(made, "positions", lambda: self._renumbered_positions(layer, generated, hidden))
            others = self.setup.renumbering.apply(made, layer, hidden, others, kwargs, positions)
        return hidden, others, kwargs

    def query_positions(self, layer: int, queries: Tensor) -> tuple[int, Tensor, Tensor]:
        """Of a layer's queries: the end of their original positions, these positions, and positions in the cache."""
        new = torch.arange(queries.shape[1], device=queries.device)
        generated = self.made["cache", layer][0]
        length, width = self.prompt.length, self.prompt.of(layer, queries.device).width
        return length + generated + queries.shape[1], length + generated + new, width + generated + new

    def _cache_state(self, source: int, queries: int, kwargs: dict[str, Any]) -> tuple[int, int, int]:
        """Of a layer's cache: tokens after the prompt, keys that this call attends to, and new tokens."""
        cached, prompt = kwargs["past_key_values"].layers[source], self.prompt
        generated = cached.get_seq_length() - prompt.segments[prompt.segment_of_layer[source]].width
        if generated < 0:  # cropped by more than what followed the prompt
            prompt.remove_last(-generated)
            generated = 0
        return generated, cached.get_mask_sizes(queries)[0], queries

    def _mask(self, layer: int, later: int, num_keys: int, hidden: Tensor) -> Tensor | None:
        """The attention mask of a layer.

        Args:
            layer: decoder layer.
            later: tokens after the prompt, the new ones included; the last of them are the queries.
            num_keys: keys that the cache returns: the last ones, in a sliding layer not all.
            hidden: the layer's hidden states.
        """
        prompt, device = self.prompt, hidden.device
        source = self.setup.backbone.kv_sources[layer]
        segment, keys = prompt.of(layer, device), prompt.of(source, device)
        span = self.setup.masks.spans[layer]
        queries = hidden.shape[-2]
        plain = keys.sizes is None and not segment.padded and keys is segment
        unmasked = plain and not prompt.later_turns and not span.limited
        if queries == 1 and unmasked:
            return None
        batch = len(segment.index)
        fresh = torch.arange(prompt.length, prompt.length + later, device=device).expand(batch, -1)
        prompt_valid = prompt.remaining(keys, segment)
        fresh_valid = torch.ones_like(fresh, dtype=torch.bool)
        if prompt.later_turns and self.attention_mask is not None:
            given = self.attention_mask.bool().to(device)
            prompt_valid = prompt_valid & given.gather(1, keys.index)
            fresh_valid = given[:, prompt.length :]
        position = torch.cat([keys.index, fresh], 1)[:, -num_keys:]
        valid = torch.cat([prompt_valid, fresh_valid], 1)[:, -num_keys:]
        sizes = keys.sizes
        if sizes is not None:
            sizes = torch.cat([sizes, torch.ones_like(fresh, dtype=torch.float32)], 1)[:, -num_keys:]
        first = prompt.first(device)
        return self.setup.masks.build(span, fresh[:, -queries:], position, valid, first, hidden.dtype, sizes)

    def _renumbered_positions(self, layer: int, generated: int, hidden: Tensor) -> Tensor:
        """Positions of the new tokens, counted without the dropped tokens, ``[batch, new]``."""
        segment = self.prompt.of(layer, hidden.device)
        first = segment.valid.sum(1, keepdim=True) + generated
        return first + torch.arange(hidden.shape[-2], device=hidden.device)

    def _check_call(self, hidden: Tensor, generated: int) -> None:
        """Refuse a batch or a mask that does not belong to the cache."""
        rows = len(self.prompt.segments[0].index)
        if hidden.shape[-3] != rows:
            raise PruningError(f"the cache was filled with {rows} rows, this call has {hidden.shape[-3]}")
        total = self.prompt.length + generated + hidden.shape[-2]
        mask = self.attention_mask
        if mask is not None and mask.dim() == 2 and mask.shape[1] != total:
            raise PruningError(
                f"attention_mask covers {mask.shape[1]} tokens, prompt and continuation have {total}; "
                "later turns need the mask of the whole conversation"
            )
