"""A prompt on its way through the decoder: scoring, dropping, and every layer's arguments cut to what is left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from pruning_runtime.attention_rows import attention_rows, padded_indices
from pruning_runtime.attention_tap import AttentionInputs
from pruning_runtime.backbone import Backbone, UnsupportedBackbone
from pruning_runtime.masks import AttentionSpan, kernel_mask, shortened_mask, weighted_mask
from pruning_runtime.record import StageRecord, Stopwatch
from pruning_runtime.renumbering import TABLE, Renumbering
from pruning_runtime.schedule import Schedule
from pruning_runtime.scorers import AttentionScorer, PositionScorer, Scorer
from pruning_runtime.selection import StagePlan, gather_positions, merge_dropped, select_kept
from pruning_runtime.sequence import PrunedPrompt, PruningError, Segment, once

LayerArguments = tuple[Tensor, tuple[Any, ...], dict[str, Any]]
"""A decoder layer's hidden states, its other positional arguments, and its keyword arguments."""

# Keyword arguments of a decoder layer that hold no entry per position of the prompt, or are not ours to cut.
_LEFT_ALONE = frozenset(
    {"attention_mask", "past_key_values", "shared_kv_states", "use_cache", "hidden_states"}
)
# Made anew where positions are renumbered.
_NUMBERED = frozenset({TABLE, "position_ids"})


class _Seen(Exception):
    """Layer 0 was run as far as its attention kernel, for its queries and keys."""


@dataclass
class Prefill:
    """One prompt on its way through the decoder.

    Attributes:
        prompt: what each layer sees of it.
        number: prefills that came before it inside the same ``with``.
        vision, text_queries: bool ``[batch, length]``.
        num_text_queries: the most of any row.
        plan: its stages by layer.
        keep: vision tokens to keep by stage layer, ``[batch]`` on the decoder's device.
        image newlines: vision tokens that mark the layout, where the schedule protects them and the model has them.
        deepstack: features to add before a layer, ``[batch, places, width]``; behind a stage those of what is left.
        scores: of the stage that comes next.
        looking: layer 0 is run for its queries and keys only.
        stages: what each stage did.
        cache: where its keys go.
        gathered: arguments cut for the current segment; the model hands the same objects to every layer.
    """

    prompt: PrunedPrompt
    number: int
    vision: Tensor
    text_queries: Tensor
    num_text_queries: int
    plan: dict[int, StagePlan]
    keep: dict[int, Tensor]
    image_newlines: Tensor | None = None
    deepstack: dict[int, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    before_decoder_only: bool = False
    stages: list[StageRecord] = field(default_factory=list)
    cache: Cache | None = None
    gathered: dict[Any, Any] = field(default_factory=dict)

    def fill(self, cache: Any) -> None:
        """Let ``cache`` carry the prompt, for the tokens that come behind it."""
        self.cache = cache
        cache.pruned_prompt = self.prompt


class PrefillPruner:
    """What happens to a prompt before each decoder layer and inside its attention."""

    def __init__(
        self,
        backbone: Backbone,
        schedule: Schedule,
        scorer: Scorer,
        renumbering: Renumbering | None,
        watch: Stopwatch,
        keep_scores: bool,
    ) -> None:
        self.backbone, self.scorer = backbone, scorer
        self._renumbering = renumbering
        self._watch = watch
        self._keep_scores = keep_scores
        self._merged = schedule.dropped_tokens == "merge"
        self._kernel: str = backbone.text_model.config._attn_implementation
        self._attention_spans = AttentionSpan.of_layers(backbone)

    def before_layer(
        self,
        forward: Prefill,
        layer: int,
        hidden: Tensor,
        others: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> LayerArguments | None:
        """Drop tokens where a stage is due and cut a layer's arguments; None where nothing changes."""
        prompt = forward.prompt
        if layer == 0 and (cache := kwargs.get("past_key_values")) is not None:
            forward.fill(cache)
        stage = forward.plan.get(layer - 1)
        if stage is not None:
            if layer == 0 and isinstance(self.scorer, AttentionScorer):
                with self._watch.part("scoring"):
                    self._score_before_decoder(forward, hidden, others, kwargs)
            with self._watch.part("dropping"):
                hidden = self._drop(forward, stage, hidden)
        prompt.segment_of_layer[layer] = len(prompt.segments) - 1
        segment = prompt.of(layer, hidden.device)
        if (features := forward.deepstack.get(layer)) is not None:
            hidden = hidden + features.to(hidden.device)
        # Layers that only read another layer's keys may be given the prompt's last tokens alone (Gemma 4).
        last_only = hidden.shape[-2] != segment.width
        if len(prompt.segments) == 1 and not last_only:
            return None if features is None else (hidden, others, kwargs)

        kwargs = dict(kwargs)
        if not last_only:
            for name, value in kwargs.items():
                if name not in _LEFT_ALONE and not (self._renumbering and name in _NUMBERED):
                    kwargs[name] = self._cut(forward, name, value, segment)
        if kwargs.get("position_ids") is not None and self._kernel.startswith("flash"):
            # Flash attention reads gaps in the positions as packed sequences; it needs none of them.
            kwargs["position_ids"] = None
        kwargs["attention_mask"] = self._mask(forward, layer, kwargs.get("attention_mask"), hidden, segment)
        if not last_only:
            others = tuple(
                self._cut(forward, f"argument {place}", value, segment) for place, value in enumerate(others)
            )
        if self._renumbering is not None:
            places = once(
                forward.gathered, "places", lambda: (segment.valid.long().cumsum(1) - 1).clamp(min=0)
            )
            others = self._renumbering.apply(forward.gathered, layer, hidden, others, kwargs, places)
        return hidden, others, kwargs

    def _score_before_decoder(
        self, forward: Prefill, hidden: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Score all tokens by layer 0's queries and keys, before it runs; nothing enters its cache.

        The layer's own forward is stopped where its kernel would begin, so no family's projections, norms and
        rotations need to be known here.
        """
        forward.prompt.segment_of_layer[0] = 0
        if (features := forward.deepstack.get(0)) is not None:
            hidden = hidden + features.to(hidden.device)
        forward.before_decoder_only = True
        try:
            # Past the hooks of a call, of which this is one.
            run = self.backbone.layers[0].forward
            if "hidden_states" in kwargs:
                run(**{**kwargs, "hidden_states": hidden, "past_key_values": None})
            else:
                run(hidden, *others, **{**kwargs, "past_key_values": None})
        except _Seen:
            pass
        finally:
            forward.before_decoder_only = False

    def _drop(self, forward: Prefill, stage: StagePlan, hidden: Tensor) -> Tensor:
        before = forward.prompt.segments[-1].to(hidden.device)
        vision = forward.vision.to(hidden.device).gather(1, before.index) & before.valid
        keep = forward.keep[stage.layer].to(hidden.device)
        protected = forward.image_newlines
        if protected is not None:
            protected = protected.to(hidden.device).gather(1, before.index) & vision
        merged = None if before.weights is None else vision & (before.weights > 1)
        if isinstance(self.scorer, PositionScorer):
            scores = self._score_positions(forward, vision, protected, before.index, keep)
        elif forward.scores is not None:
            scores = forward.scores.to(hidden.device)
        else:
            raise PruningError(
                f"layer {stage.layer} ran without its attention being seen; its kernel was bypassed"
            )
        first = protected if merged is None else merged if protected is None else protected | merged
        place, valid = select_kept(scores, vision, before.valid, keep, stage.width, first)
        if self._merged and protected is not None:  # the last to take others in
            scores = scores.masked_fill(protected, torch.finfo(scores.dtype).max)

        def shortened(states: Tensor) -> tuple[Tensor, Tensor | None]:
            if self._merged:
                return merge_dropped(states, before.weights, scores, vision, before.valid, place, valid)
            return gather_positions(states, place, states.dim() - 2), None

        # Where the model itself goes on with its last tokens only, they are still there.
        last_only = hidden.shape[-2] != before.width
        hidden, weights = (hidden, None) if last_only else shortened(hidden)
        # A mean takes in the mean of what is added to its tokens later.
        forward.deepstack = {
            layer: shortened(features.to(hidden.device))[0]
            for layer, features in forward.deepstack.items()
            if layer > stage.layer
        }
        after = Segment(before.index.gather(1, place), valid, stage.filled, weights)
        forward.prompt.segments.append(after)
        forward.gathered.clear()
        kept_vision = vision.gather(1, place) & valid
        kept_scores = scores if self._keep_scores else None
        forward.stages.append(StageRecord(stage.layer, stage.keep, after.index, kept_vision, kept_scores))
        return hidden

    def _score_positions(
        self, forward: Prefill, vision: Tensor, protected: Tensor | None, position: Tensor, keep: Tensor
    ) -> Tensor:
        """Scores for the places that protected tokens leave free, so that a rule spreads over those alone."""
        assert isinstance(self.scorer, PositionScorer)
        if protected is not None:
            keep = (keep - protected.sum(1)).clamp(min=0)
            vision = vision & ~protected
        return self.scorer.score_positions(vision, position, keep, forward.number)

    def on_attention(self, forward: Prefill, inputs: AttentionInputs) -> None:
        """Score vision tokens where a stage follows this layer, or looks at it."""
        if forward.before_decoder_only:
            self._score(forward, inputs)
            raise _Seen
        if inputs.layer in forward.plan:
            with self._watch.part("scoring"):
                self._score(forward, inputs)

    def _score(self, forward: Prefill, inputs: AttentionInputs) -> None:
        scorer = self.scorer
        assert isinstance(scorer, AttentionScorer)
        segment = forward.prompt.of(inputs.layer, inputs.query.device)
        is_text_query = forward.text_queries.to(inputs.query.device).gather(1, segment.index) & segment.valid
        width = 1 if scorer.last_row_only else max(forward.num_text_queries, 1)
        rows, real = padded_indices(is_text_query, width, last_only=scorer.last_row_only)
        blocks = attention_rows(
            inputs.query,
            inputs.key,
            rows,
            real,
            inputs.mask,
            inputs.scaling,
            softcap=inputs.softcap,
            sliding_window=inputs.sliding_window,
        )
        scores = inputs.query.new_zeros(segment.index.shape, dtype=torch.float32)
        for block in blocks:
            scores += scorer.score_heads(block, rows, real)
        forward.scores = scores

    def _cut(self, forward: Prefill, name: str, value: Any, segment: Segment) -> Any:
        """``value`` with one entry per place of the segment where it had one per position of the prompt."""
        if isinstance(value, tuple):
            return tuple(self._cut(forward, name, part, segment) for part in value)
        if not isinstance(value, Tensor) or not value.dim():
            return value
        sequence = _sequence_dimension(name, value, forward.prompt.length)
        if sequence is None:
            return value
        # Kept with the result, so that the id stays taken for as long as the entry lives.
        cut, _ = once(
            forward.gathered, id(value), lambda: (gather_positions(value, segment.index, sequence), value)
        )
        return cut

    def _mask(
        self, forward: Prefill, layer: int, mask: Tensor | None, hidden: Tensor, segment: Segment
    ) -> Tensor | None:
        source = self.backbone.kv_sources[layer]
        keys = forward.prompt.of(source, hidden.device)
        attends = self.backbone.attends(layer)
        attention_span = self._attention_spans[layer]
        rows = hidden.shape[-2]

        def make() -> Tensor | None:
            valid = forward.prompt.still_there(keys, segment)
            if mask is not None:
                cut = shortened_mask(mask.to(hidden.device), segment.index, keys.index, valid)
                return cut if keys.weights is None else weighted_mask(cut, keys.weights, hidden.dtype)
            # Without a mask a kernel is causal from the first key on, which is right for all queries or one.
            plain = keys.weights is None and not segment.filled
            if plain and keys is segment and rows in (1, segment.width):
                return None
            if not attends:
                return valid
            queries = segment.index[:, -rows:]
            first = forward.prompt.first(hidden.device)
            allowed = attention_span.allows(queries, keys.index, first) & valid[:, None, :]
            made = kernel_mask(allowed, valid, self._kernel, hidden.dtype)
            return made if keys.weights is None else weighted_mask(made, keys.weights, hidden.dtype)

        key = ("mask", id(mask), source if keys is not segment else None, attends, attention_span, rows)
        made, _ = once(forward.gathered, key, lambda: (make(), mask))
        return made


def _sequence_dimension(name: str, value: Tensor, length: int) -> int | None:
    """Which dimension of a layer's argument runs over the prompt; None where none does."""
    if name == "position_ids":
        return value.dim() - 1 if value.shape[-1] == length else None
    if name == "position_embeddings":
        return value.dim() - 2 if value.shape[-2] == length else None
    found = [dimension for dimension in range(1, value.dim()) if value.shape[dimension] == length]
    if value.dim() == 3 and 1 in found:
        return 1  # features of each position, which may be as many as there are positions
    if len(found) > 1:
        raise UnsupportedBackbone(
            f"{name} of shape {tuple(value.shape)} has several dimensions as long as the prompt ({length}); "
            "which of them runs over it cannot be told"
        )
    return found[0] if found else None
