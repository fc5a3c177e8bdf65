"""Generated tokens and later turns behind a pruned prompt: every layer's mask fits the keys that its cache holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pruning_runtime.backbone import Backbone
from pruning_runtime.masks import AttentionSpan, kernel_mask, weighted_mask
from pruning_runtime.prefill import LayerArguments
from pruning_runtime.renumbering import Renumbering
from pruning_runtime.sequence import PrunedPrompt, PruningError, once


@dataclass
class Continuation:
    """Generated tokens, or a later turn, on a pruned prompt's cache.

    ``made`` holds masks and rotary tables, one for all layers of a segment.
    """

    prompt: PrunedPrompt
    attention_mask: Tensor | None
    made: dict[Any, Any] = field(default_factory=dict)


class ContinuationPruner:
    """What happens to tokens behind a prompt before each decoder layer."""

    def __init__(self, backbone: Backbone, renumbering: Renumbering | None) -> None:
        self.backbone = backbone
        self._renumbering = renumbering
        self._kernel: str = backbone.text_model.config._attn_implementation
        self._attention_spans = AttentionSpan.of_layers(backbone)

    def before_layer(
        self,
        forward: Continuation,
        layer: int,
        hidden: Tensor,
        others: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> LayerArguments | None:
        """Give a layer the mask of its own keys; None where nothing changes."""
        prompt = forward.prompt
        if len(prompt.segments) == 1 or not self.backbone.attends(layer):
            return None
        queries = hidden.shape[-2]
        prompt.later_turns |= queries > 1
        source = self.backbone.kv_sources[layer]
        # Counted from the cache itself, so that cropping it (assisted decoding) is followed; and only where
        # the layer has not added its new keys yet, so layers that share keys read what their source found.
        # A layer that shares keys may get fewer queries than there are new tokens, which its source saw all.
        generated, keys_seen, new = once(
            forward.made, ("cache", source), lambda: self._cache_state(prompt, source, queries, kwargs)
        )
        # At the first layer that has keys to count; a hybrid may begin with recurrent ones.
        if not any(map(self.backbone.attends, range(layer))):
            self._check_rows_and_mask(forward, hidden, generated)
        segment = prompt.segment_of_layer[layer]
        attention_span = self._attention_spans[layer]
        kwargs = dict(kwargs)
        kwargs["attention_mask"] = once(
            forward.made,
            ("mask", segment, prompt.segment_of_layer[source], attention_span, keys_seen, queries),
            lambda: self._mask(forward, layer, source, attention_span, generated + new, keys_seen, hidden),
        )
        if self._renumbering is not None and segment > 0:
            made = forward.made.setdefault(("numbering", segment), {})
            places = once(made, "places", lambda: self._later_places(prompt, layer, generated, hidden))
            others = self._renumbering.apply(made, layer, hidden, others, kwargs, places)
        return hidden, others, kwargs

    def _cache_state(
        self, prompt: PrunedPrompt, source: int, queries: int, kwargs: dict[str, Any]
    ) -> tuple[int, int, int]:
        """Tokens after the prompt that are cached already, keys that this call will see, and new tokens."""
        cached = kwargs["past_key_values"].layers[source]
        width = prompt.segments[prompt.segment_of_layer[source]].width
        return cached.get_seq_length() - width, cached.get_mask_sizes(queries)[0], queries

    def _mask(
        self,
        forward: Continuation,
        layer: int,
        source: int,
        attention_span: AttentionSpan,
        later: int,
        keys_seen: int,
        hidden: Tensor,
    ) -> Tensor | None:
        """The mask of ``later`` tokens after the prompt, of which the last are this layer's queries."""
        prompt, device = forward.prompt, hidden.device
        segment, keys = prompt.of(layer, device), prompt.of(source, device)
        queries = hidden.shape[-2]
        plain = keys.weights is None and not segment.filled
        unmasked = plain and not (prompt.later_turns or attention_span.limited) and keys is segment
        if queries == 1 and unmasked:
            return None
        batch = len(segment.index)
        fresh = torch.arange(prompt.length, prompt.length + later, device=device).expand(batch, -1)
        fresh_valid = torch.ones_like(fresh, dtype=torch.bool)
        if prompt.later_turns and forward.attention_mask is not None:
            fresh_valid = forward.attention_mask[:, prompt.length :].bool().to(device)
        position = torch.cat([keys.index, fresh], 1)[:, -keys_seen:]
        valid = torch.cat([prompt.still_there(keys, segment), fresh_valid], 1)[:, -keys_seen:]
        allowed = (
            attention_span.allows(fresh[:, -queries:], position, prompt.first(device)) & valid[:, None, :]
        )
        made = kernel_mask(allowed, valid, self._kernel, hidden.dtype)
        if keys.weights is None:
            return made
        weights = torch.cat([keys.weights, torch.ones_like(fresh, dtype=torch.float32)], 1)[:, -keys_seen:]
        return weighted_mask(made, weights, hidden.dtype)

    def _later_places(self, prompt: PrunedPrompt, layer: int, generated: int, hidden: Tensor) -> Tensor:
        segment = prompt.of(layer, hidden.device)
        first = segment.valid.sum(1, keepdim=True) + generated
        return first + torch.arange(hidden.shape[-2], device=hidden.device)

    def _check_rows_and_mask(self, forward: Continuation, hidden: Tensor, generated: int) -> None:
        rows = len(forward.prompt.segments[0].index)
        if hidden.shape[-3] != rows:
            raise PruningError(f"the cache was filled with {rows} rows, this call has {hidden.shape[-3]}")
        total = forward.prompt.length + generated + hidden.shape[-2]
        mask = forward.attention_mask
        if mask is not None and mask.dim() == 2 and mask.shape[1] != total:
            raise PruningError(
                f"attention_mask covers {mask.shape[1]} tokens, prompt and continuation have {total}; "
                "later turns need the mask of the whole conversation"
            )
