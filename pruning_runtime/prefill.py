"""One prompt in the decoder: scoring, dropping, and the arguments of every layer for the tokens that are left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from pruning_runtime.attention_rows import find_text_queries
from pruning_runtime.attention_tap import AttentionInputs
from pruning_runtime.cache_guard import attach_prompt
from pruning_runtime.errors import UnsupportedBackbone
from pruning_runtime.merging import merge_dropped
from pruning_runtime.model_quirks import deepstack
from pruning_runtime.model_quirks.image_newline import image_newline_mask
from pruning_runtime.preflight import check_answer
from pruning_runtime.record import Record, StageRecord
from pruning_runtime.renumbering import TABLE
from pruning_runtime.scorers import AttentionScorer
from pruning_runtime.scoring import PromptCounts, StageScoring, find_frame_problems
from pruning_runtime.selection import StagePlan, gather_positions, plan_stages, select_kept
from pruning_runtime.sequence import PrunedPrompt, Segment, once, restore_length
from pruning_runtime.setup import PruningSetup
from pruning_runtime.token_groups import image_counts, image_numbers
from pruning_runtime.tower_tokens import PromptTower

LayerArguments = tuple[Tensor, tuple[Any, ...], dict[str, Any]]
"""A decoder layer's hidden states, its other positional arguments, and its keyword arguments."""

# Keyword arguments of a decoder layer that have no entry per position, or that are handled on their own.
_NOT_GATHERED = frozenset(
    {"attention_mask", "past_key_values", "shared_kv_states", "use_cache", "hidden_states"}
)
# Made again where positions are renumbered.
_RENUMBERED = frozenset({TABLE, "position_ids"})


@dataclass
class Prefill:
    """One prompt (a batch of rows) on its way through the decoder.

    Attributes:
        setup: of the ``with``.
        prompt: the positions that each layer holds.
        scoring: scores the stages.
        vision: bool ``[batch, length]``.
        plan: stages of this prompt, by layer.
        keep: vision tokens to keep, by stage layer; ``[batch]`` on the decoder's device.
        image_newlines: protected vision tokens, bool ``[batch, length]``; None: no token is protected.
        deepstack: features to add before a layer, ``[batch, slots, width]``, for the slots of the last segment.
        stages: results of the stages so far.
        cache: receives the prompt's keys and values.
        gathered: arguments and masks for the last segment. A model passes the same objects to all layers, so each
            is gathered once.
    """

    setup: PruningSetup
    prompt: PrunedPrompt
    scoring: StageScoring
    vision: Tensor
    plan: dict[int, StagePlan]
    keep: dict[int, Tensor]
    image_newlines: Tensor | None = None
    deepstack: dict[int, Tensor] = field(default_factory=dict)
    stages: list[StageRecord] = field(default_factory=list)
    cache: Cache | None = None
    gathered: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, setup: PruningSetup, vision: Tensor, valid: Tensor, record: Record, answer_length: int = 0
    ) -> Prefill:
        """Count the tokens of a prompt and fix what every stage keeps.

        This is the only transfer to the host: six or seven numbers per row. All shapes of the prefill follow from them.

        Args:
            setup: of the ``with``.
            vision, valid: bool ``[batch, length]``; ``vision`` is True at valid vision tokens only.
            record: starts to describe this prompt.
            answer_length: last positions of each row that are a given answer; `check_answer` refuses some.
        """
        batch, length = vision.shape
        text_queries = find_text_queries(vision, valid, answer_length)
        counted = vision, valid, text_queries, vision[:, max(length - answer_length, 0) :]
        sums = [mask.sum(1) for mask in counted]
        images = image_numbers(vision)
        frames = find_frame_problems(setup, vision, images)
        counts = torch.stack([*sums, *image_counts(vision, images), *frames]).tolist()
        num_vision, num_valid, num_text_queries, in_answer, num_images, largest, *frame_problems = counts
        check_answer(answer_length, length, in_answer)
        num_other = [every - count for every, count in zip(num_valid, num_vision, strict=True)]
        plan = plan_stages(setup.stages, num_vision, num_other)
        keep = torch.tensor([stage.keep for stage in plan]).to(vision.device, non_blocking=True)
        position = torch.arange(length, device=vision.device).expand(batch, length)
        record.begin_prefill(num_vision, num_other)
        whole = Segment(position, valid, padded=min(num_valid) < length)
        prompt = PrunedPrompt(length, [whole], has_vision=any(num_vision))
        host = PromptCounts(max(num_text_queries), max(num_vision), max(num_images), max(largest))
        scoring = StageScoring(setup, prompt, record.prefills - 1, vision, text_queries, host)
        scoring.check_text(num_text_queries, num_vision)
        scoring.check_frames(frame_problems)
        if setup.tower is not None:
            scoring.tower = PromptTower(setup.tower, vision, num_vision)
        return cls(
            setup=setup,
            prompt=prompt,
            scoring=scoring,
            vision=vision,
            plan={stage.layer: stage for stage in plan},
            keep={stage.layer: row for stage, row in zip(plan, keep, strict=True)},
            stages=record.stages,
        )

    def take_features(self, arguments: dict[str, Any]) -> None:
        """Remove DeepStack's features from the decoder's ``arguments`` and find the protected tokens."""
        embeddings = arguments["inputs_embeds"]
        self.deepstack = deepstack.take_features(arguments, embeddings)
        if self.setup.image_newlines:
            given = [embeddings, *self.deepstack.values()]
            self.image_newlines = image_newline_mask(self.setup.image_newlines, given, self.vision)

    def attach_cache(self, cache: Any) -> None:
        """Store the prompt with ``cache``, for the tokens that follow."""
        self.cache = cache
        attach_prompt(cache, self.prompt, self.setup.lease)

    def on_attention(self, inputs: AttentionInputs) -> None:
        """Receives the attention inputs of every layer."""
        self.scoring.on_attention(inputs, is_stage=inputs.layer in self.plan)

    def restore(self, output: Any) -> Any:
        """The decoder's output at the prompt's original positions."""
        return restore_length(output, self.prompt)

    def before_layer(
        self, layer: int, hidden: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> LayerArguments | None:
        """Apply the stage that precedes ``layer`` and gather the layer's arguments.

        Args:
            layer: decoder layer.
            hidden: its hidden states; the second dimension from the end is the sequence.
            others: its other positional arguments.
            kwargs: its keyword arguments; not changed.

        Returns:
            The new arguments; None where nothing changes.
        """
        prompt = self.prompt
        if layer == 0:
            if (cache := kwargs.get("past_key_values")) is not None:
                self.attach_cache(cache)
            self.scoring.choose_text(hidden)
        stage = self.plan.get(layer - 1)
        if stage is not None:
            if layer == 0 and isinstance(self.setup.scorers[stage.layer], AttentionScorer):
                with self.setup.watch.part("scoring"):
                    self.scoring.before_decoder(hidden, others, kwargs, self.deepstack.get(0))
            hidden = self._drop(stage, hidden)
        prompt.segment_of_layer[layer] = len(prompt.segments) - 1
        features = self.deepstack.get(layer)
        if features is not None:
            hidden = hidden + features.to(hidden.device)
        if layer in self.plan:
            self.scoring.remember(layer, hidden)
        segment = prompt.of(layer, hidden.device)
        if len(prompt.segments) == 1 and hidden.shape[-2] == segment.width:
            return None if features is None else (hidden, others, kwargs)
        return self._gathered_arguments(layer, hidden, others, dict(kwargs), segment)

    def _gathered_arguments(
        self, layer: int, hidden: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any], segment: Segment
    ) -> LayerArguments:
        """The arguments of a layer for the slots of ``segment``; changes ``kwargs``."""
        setup = self.setup
        # A model may go on with the prompt's last tokens only in layers without keys of their own (Gemma 4).
        if hidden.shape[-2] == segment.width:
            for name, value in kwargs.items():
                if name not in _NOT_GATHERED and not (setup.renumbering and name in _RENUMBERED):
                    kwargs[name] = self._gather(name, value, segment)
            others = tuple(
                self._gather(f"argument {number}", value, segment) for number, value in enumerate(others)
            )
        if kwargs.get("position_ids") is not None and setup.masks.kernel.startswith("flash"):
            # Flash attention takes gaps in position ids for packed sequences; it does not need the ids.
            kwargs["position_ids"] = None
        kwargs["attention_mask"] = self._mask(layer, kwargs.get("attention_mask"), hidden, segment)
        if setup.renumbering is not None:
            positions = once(
                self.gathered, "positions", lambda: (segment.valid.long().cumsum(1) - 1).clamp(min=0)
            )
            others = setup.renumbering.apply(self.gathered, layer, hidden, others, kwargs, positions)
        return hidden, others, kwargs

    def query_positions(self, layer: int, queries: Tensor) -> tuple[int, Tensor, Tensor]:
        """Of a layer's queries: the end of their original positions, these positions, and positions in the cache."""
        segment = self.prompt.of(layer, queries.device)
        return self.prompt.length, segment.index, torch.arange(queries.shape[1], device=queries.device)

    # ---- dropping

    def _drop(self, stage: StagePlan, hidden: Tensor) -> Tensor:
        """Apply one stage: score the tokens, select those to keep, and append their segment to the prompt.

        Args:
            stage: the stage, planned for this batch.
            hidden: hidden states before it, ``[..., slots, features]``.

        Returns:
            Hidden states of the kept tokens, ``[..., stage.width, features]``. If the model itself kept the last
            tokens only, they are all kept, and ``hidden`` is returned unchanged.
        """
        before = self.prompt.segments[-1].to(hidden.device)
        vision = self.vision.to(hidden.device).gather(1, before.index) & before.valid
        keep = self.keep[stage.layer].to(hidden.device)
        protected = self.image_newlines
        if protected is not None:
            protected = protected.to(hidden.device).gather(1, before.index) & vision
        scores = self.scoring.stage_scores(stage, before, hidden, vision, keep, protected)
        with self.setup.watch.part("dropping"):
            return self._select(stage, before, hidden, vision, keep, scores, protected)

    def _select(
        self,
        stage: StagePlan,
        before: Segment,
        hidden: Tensor,
        vision: Tensor,
        keep: Tensor,
        scores: Tensor,
        protected: Tensor | None,
    ) -> Tensor:
        """Select the tokens to keep by ``scores``; arguments as of `StageScoring.stage_scores`, result as of `_drop`.

        Protected tokens and the token that others were merged into rank above all others. DeepStack features of later
        layers are shortened in the same way as the hidden states; under a rule that joins tokens, they follow the kept
        token.
        """
        first = protected
        if before.sizes is not None:
            merged = vision & (before.sizes > 1)
            first = merged if protected is None else protected | merged
        index, valid = select_kept(scores, vision, before.valid, keep, stage.width, first)
        # A protected token is merged into only if no other is kept.
        if self.setup.merge and protected is not None:
            scores = scores.masked_fill(protected, torch.finfo(scores.dtype).max)

        def shorten(states: Tensor) -> tuple[Tensor, Tensor | None]:
            if self.setup.merge:
                return merge_dropped(states, before.sizes, scores, vision, before.valid, index, valid)
            return gather_positions(states, index, states.dim() - 2), None

        sizes = None
        if hidden.shape[-2] == before.width:
            hidden, sizes = shorten(self.scoring.joined(hidden, index, valid))
        # A merged token receives the mean of the features of its tokens.
        self.deepstack = {
            layer: shorten(features.to(hidden.device))[0]
            for layer, features in self.deepstack.items()
            if layer > stage.layer
        }
        after = Segment(before.index.gather(1, index), valid, stage.padded, sizes)
        self.prompt.segments.append(after)
        self.gathered.clear()
        self._record(stage, after, vision.gather(1, index) & valid, scores)
        return hidden

    def _record(self, stage: StagePlan, after: Segment, kept_vision: Tensor, scores: Tensor) -> None:
        """Append the result of a stage to `stages`."""
        self.stages.append(
            StageRecord(
                layer=stage.layer,
                keep=stage.keep,
                _index=after.index,
                _kept_vision=kept_vision,
                scores=scores if self.setup.keep_scores else None,
                scorer=self.setup.scorers[stage.layer].name,
            )
        )

    # ---- arguments of a layer

    def _gather(self, name: str, value: Any, segment: Segment) -> Any:
        """``value`` for the slots of ``segment``, if it has one entry per position of the prompt."""
        if isinstance(value, tuple):
            return tuple(self._gather(name, part, segment) for part in value)
        if not isinstance(value, Tensor) or not value.dim():
            return value
        dim = _sequence_dimension(name, value, self.prompt.length)
        if dim is None:
            return value
        # `value` is stored with the result: it must not be freed while its id is a key.
        gathered, _ = once(
            self.gathered, id(value), lambda: (gather_positions(value, segment.index, dim), value)
        )
        return gathered

    def _mask(self, layer: int, mask: Tensor | None, hidden: Tensor, segment: Segment) -> Tensor | None:
        """The attention mask of a layer.

        Args:
            layer: decoder layer.
            mask: the model's mask for the whole prompt; None where it relies on a causal kernel.
            hidden: the layer's hidden states.
            segment: its queries. Its keys are those of its source layer, which may have run on more tokens.
        """
        setup = self.setup
        source = setup.backbone.kv_sources[layer]
        keys = self.prompt.of(source, hidden.device)
        attends, span = setup.backbone.attends(layer), setup.masks.spans[layer]
        rows = hidden.shape[-2]

        def make() -> Tensor | None:
            valid = self.prompt.remaining(keys, segment)
            if mask is not None:
                return setup.masks.shorten(mask, segment, keys, valid, hidden.dtype)
            # Without a mask the kernel is causal, which is right if all keys are valid and have size 1.
            if keys.sizes is None and not segment.padded and keys is segment and rows in (1, segment.width):
                return None
            if not attends:
                return valid
            first = self.prompt.first(hidden.device)
            queries = segment.index[:, -rows:]
            return setup.masks.build(span, queries, keys.index, valid, first, hidden.dtype, keys.sizes)

        key = ("mask", id(mask), source if keys is not segment else None, attends, span, rows)
        made, _ = once(self.gathered, key, lambda: (make(), mask))
        return made


def _sequence_dimension(name: str, value: Tensor, length: int) -> int | None:
    """The dimension of a layer's argument that runs over the prompt; None if there is none."""
    if name == "position_ids":
        return value.dim() - 1 if value.shape[-1] == length else None
    if name == "position_embeddings":
        return value.dim() - 2 if value.shape[-2] == length else None
    found = [dimension for dimension in range(1, value.dim()) if value.shape[dimension] == length]
    if value.dim() == 3 and 1 in found:
        return 1  # features per position; their number may equal the length
    if len(found) > 1:
        raise UnsupportedBackbone(
            f"{name} of shape {tuple(value.shape)} has several dimensions of the prompt's length ({length}), so it "
            "is unknown which of them to gather"
        )
    return found[0] if found else None
