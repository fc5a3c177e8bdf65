"""Apply a schedule to a stock model for as long as a ``with`` lasts.

Hooks on the decoder layers drop tokens from the hidden states and re-gather masks and rotary tables;
the attention tap supplies the scores. The model's own layer loop, kernels and cache are used as they
are: every layer simply sees a shorter sequence, and its cache holds exactly the tokens it saw.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from pruning_runtime.attention_rows import attention_rows, find_raters, index_raters
from pruning_runtime.attention_tap import AttentionInputs, attention_tap
from pruning_runtime.backbone import Backbone, UnsupportedBackbone, find_backbone
from pruning_runtime.drop_tokens import (
    StagePlan,
    gather_positions,
    merge_dropped,
    plan_stages,
    select_kept,
)
from pruning_runtime.families import deepstack
from pruning_runtime.families.rotary import TABLE, find_rotary, table_place, why_not_renumbered
from pruning_runtime.families.separators import find_separators, separator_mask
from pruning_runtime.families.temperature import Temperature, find_temperature
from pruning_runtime.masks import Reach, kernel_mask, shortened_mask, weighted_mask
from pruning_runtime.prompt import PrunedPrompt, Segment, restore_length
from pruning_runtime.record import Record, StageRecord, Stopwatch
from pruning_runtime.schedule import Schedule, ScheduleError
from pruning_runtime.scorers import AttentionScorer, PositionScorer, make_scorer

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_in_use: WeakSet[nn.Module] = WeakSet()
_in_use_lock = threading.Lock()

# Keyword arguments of a decoder layer that hold no entry per position of the prompt, or are not ours to cut.
_LEFT_ALONE = frozenset(
    {"attention_mask", "past_key_values", "shared_kv_states", "use_cache", "hidden_states"}
)


# Made anew where positions are renumbered.
_NUMBERED = frozenset({TABLE, "position_ids"})


class PruningError(RuntimeError):
    """A call that a pruned model cannot serve rightly; the message says what to do instead."""


@contextmanager
def pruned(
    model: PreTrainedModel,
    schedule: Schedule,
    *,
    vision_mask: Tensor | None = None,
    keep_scores: bool = False,
    timing: bool = False,
) -> Iterator[Record]:
    """Run ``model`` with vision tokens dropped as ``schedule`` says; afterwards it is untouched.

    Inside the ``with``, `forward` and `generate` are called as always. The logits are those of the
    unpruned sequence in which dropped tokens cannot be attended to by later layers. A `forward` that
    asks for all logits gets them at their original places; those of dropped tokens mean nothing.

    Args:
        model: a stock Hugging Face vision-language model, in inference.
        schedule: made for this backbone.
        vision_mask: bool ``[batch, length]``, needed only where the prompt is given as
            ``inputs_embeds``; otherwise vision tokens are found by their ids.
        keep_scores: keep every stage's scores in the record.
        timing: measure milliseconds by part.

    Yields:
        The `Record`, which is filled in by each prefill.

    Raises:
        ScheduleError: the schedule was made for another backbone.
        UnsupportedBackbone: the model, or how it is set up, cannot be pruned rightly.
        PruningError: the model is already inside a `pruned`.
    """
    backbone = find_backbone(model)
    schedule.check_backbone(backbone)
    _refuse_setup(backbone, schedule)
    with _exclusive(model), ExitStack() as undo:
        pruner = _Pruner(backbone, schedule, vision_mask, keep_scores, timing)
        hooks = [
            model.register_forward_pre_hook(pruner.before_model, with_kwargs=True),
            backbone.text_model.register_forward_pre_hook(pruner.before_decoder, with_kwargs=True),
            backbone.text_model.register_forward_hook(pruner.after_decoder),
        ]
        for layer, block in enumerate(backbone.layers):
            hooks.append(block.register_forward_pre_hook(pruner.before_layer(layer), with_kwargs=True))
            if (temperature := find_temperature(block)) is not None and schedule.positions == "original":
                correct = pruner.after_queries(layer, temperature)
                hooks.append(temperature.queries.register_forward_hook(correct))
        for hook in hooks:
            undo.callback(hook.remove)
        if isinstance(pruner.scorer, AttentionScorer):
            undo.enter_context(attention_tap(backbone, pruner.on_attention))
        yield pruner.record


@contextmanager
def _exclusive(model: nn.Module) -> Iterator[None]:
    with _in_use_lock:
        if model in _in_use:
            raise PruningError(
                "this model is already inside `pruned`; leave that `with` first, or load a second copy"
            )
        _in_use.add(model)
    try:
        yield
    finally:
        with _in_use_lock:
            _in_use.discard(model)


def _refuse_setup(backbone: Backbone, schedule: Schedule) -> None:
    model, family = backbone.model, type(backbone.model).__name__
    generation = getattr(model, "generation_config", None)
    # The second name is what releases before 5.23 know.
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    checkpointing = next((name for name in names if hasattr(type(model), name)), None)
    if model.training and checkpointing is not None and getattr(model, checkpointing):
        raise UnsupportedBackbone(f"{family}: pruning is for inference; call model.eval() first")
    if getattr(generation, "prefill_chunk_size", None):
        raise UnsupportedBackbone(f"{family}: generation_config.prefill_chunk_size must be None to prune")
    if "static" in (getattr(generation, "cache_implementation", None) or ""):
        raise UnsupportedBackbone(
            f"{family}: a static cache has one length for all layers; use the dynamic one"
        )
    if schedule.positions == "renumbered":
        _refuse_renumbering(backbone)
    if schedule.residual == "merged" and (reason := why_not_merged(backbone)) is not None:
        raise UnsupportedBackbone(f"{family}: {reason}; use residual 'none'")
    if not make_scorer(schedule.scorer.name, schedule.scorer.options).needs_attention:
        return
    for stage in schedule.stages:
        if not backbone.has_own_attention(stage.layer):
            usable = [layer for layer in range(len(backbone.layers)) if backbone.has_own_attention(layer)]
            raise ScheduleError(
                f"stages: layer {stage.layer} of {family} has no keys of its own to score with "
                f"({backbone.layer_kinds[stage.layer]}); scorer {schedule.scorer.name!r} can stand at {usable}"
            )


def why_not_merged(backbone: Backbone) -> str | None:
    """Why a backbone cannot be pruned with ``residual: merged``; None where it can."""
    kernel = backbone.text_model.config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        return f"attention kernel {kernel!r} cannot weigh a token; sdpa and eager can"
    if backbone.kv_sources != tuple(range(len(backbone.layers))):
        return "its layers share keys, which a merged token would have to enter again"
    if not all(map(backbone.attends, range(len(backbone.layers)))):
        return "its recurrent layers cannot weigh a token"
    return None


def _refuse_renumbering(backbone: Backbone) -> None:
    if backbone.kv_sources != tuple(range(len(backbone.layers))):
        reason: str | None = "its layers share keys, which can carry one numbering only"
    else:
        reason = why_not_renumbered(backbone.text_model, backbone.layers, backbone.layer_kinds)
    if reason is not None:
        raise UnsupportedBackbone(f"{type(backbone.model).__name__}: {reason}; use positions 'original'")


@dataclass
class _Prefill:
    """One prompt on its way through the decoder."""

    prompt: PrunedPrompt
    vision: Tensor
    raters: Tensor
    num_raters: int
    plan: dict[int, StagePlan]
    restore: bool
    scores: Tensor | None = None
    separators: Tensor | None = None
    """Vision tokens that mark the layout, where the schedule protects them and the model has them."""
    deepstack: dict[int, Tensor] = field(default_factory=dict)
    gathered: dict[Any, Any] = field(default_factory=dict)
    """Arguments cut for the current segment: the model hands the same objects to every layer."""


@dataclass
class _Continuation:
    """Generated tokens, or a later turn, on a pruned prompt's cache."""

    prompt: PrunedPrompt
    attention_mask: Tensor | None
    made: dict[Any, Any] = field(default_factory=dict)
    """Masks and rotary tables, one for all layers of a segment."""


class _Pruner:
    """The hooks of one `pruned`."""

    def __init__(
        self,
        backbone: Backbone,
        schedule: Schedule,
        vision_mask: Tensor | None,
        keep_scores: bool,
        timing: bool,
    ) -> None:
        self.backbone = backbone
        self.scorer = make_scorer(schedule.scorer.name, schedule.scorer.options)
        self._watch = Stopwatch(next(backbone.text_model.parameters()).device, timing)
        self.record = Record(num_layers=backbone.shape.num_layers, watch=self._watch)
        self._stages = schedule.stages
        self._renumbered = schedule.positions == "renumbered"
        # Looked up once: reading signatures at every layer of every token took a tenth of decoding on a small model.
        self._rotary = (
            [
                (*find_rotary(backbone.text_model, layer, backbone.layer_kinds[layer]), table_place(block))
                for layer, block in enumerate(backbone.layers)
            ]
            if self._renumbered
            else []
        )
        self._merged = schedule.residual == "merged"
        protected = schedule.separators == "protected"
        self._separators = find_separators(backbone.model, backbone.text_model) if protected else ()
        self._given_vision = vision_mask
        self._keep_scores = keep_scores
        self._kernel: str = backbone.text_model.config._attn_implementation
        self._forward: _Prefill | _Continuation | None = None

    # ---- the model: what kind of call is this, and what will each stage keep

    def before_model(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the whole model."""
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            self._forward = self._begin(input_ids, cache, kwargs)
        else:
            self._forward = self._continue(input_ids, cache, kwargs)

    def _begin(self, input_ids: Tensor | None, cache: Cache | None, kwargs: dict[str, Any]) -> _Prefill:
        if kwargs.get("cu_seq_lens_q") is not None:
            raise UnsupportedBackbone(
                "continuous batching packs prompts into one row with a paged cache, which cannot be pruned; "
                "call generate() on a padded batch"
            )
        if getattr(cache, "is_compileable", False):
            raise UnsupportedBackbone(
                f"{type(cache).__name__} has one fixed length for all layers; use a DynamicCache to prune"
            )
        vision = self._vision(input_ids, kwargs.get("inputs_embeds"))
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise PruningError(f"attention_mask must be [batch, length], found shape {tuple(mask.shape)}")
        valid = torch.ones_like(vision) if mask is None else mask.bool().to(vision.device)
        vision = vision & valid
        raters = find_raters(vision, valid)
        # The one transfer to the host: three counts per row, before the decoder starts.
        counts = torch.stack([vision.sum(1), valid.sum(1), raters.sum(1)]).tolist()
        num_vision, num_valid, num_raters = counts
        num_other = [total - seen for total, seen in zip(num_valid, num_vision, strict=True)]
        plan = plan_stages(self._stages, num_vision, num_other)

        batch, length = vision.shape
        position = torch.arange(length, device=vision.device).expand(batch, length)
        whole = Segment(position, valid, filled=min(num_valid) < length)
        self.record.begin_prefill(num_vision, num_other)
        return _Prefill(
            prompt=PrunedPrompt(length, [whole]),
            vision=vision,
            raters=raters,
            num_raters=max(num_raters),
            plan={stage.layer: stage for stage in plan},
            restore=bool(plan) and kwargs.get("logits_to_keep", 0) != 1,
        )

    def _vision(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        prompt = inputs_embeds if input_ids is None else input_ids
        if self._given_vision is not None and prompt is not None:
            if self._given_vision.shape != prompt.shape[:2]:
                raise PruningError(
                    f"vision_mask is {tuple(self._given_vision.shape)}, the prompt is {tuple(prompt.shape[:2])}"
                )
            return self._given_vision.bool().to(prompt.device)
        if input_ids is None:
            raise PruningError(
                "a prompt given as inputs_embeds needs pruned(..., vision_mask=[batch, length])"
            )
        return self.backbone.vision_mask(input_ids)

    def _continue(self, input_ids: Tensor | None, cache: Cache, kwargs: dict[str, Any]) -> _Continuation:
        prompt = getattr(cache, "pruned_prompt", None)
        if prompt is None:
            raise PruningError(
                "this cache was filled outside `pruned`, so which tokens it holds is unknown; "
                "run the whole prompt inside the `with`"
            )
        # Looked at only where several tokens come at once: a generated token costs no host transfer.
        tokens = input_ids if input_ids is not None and input_ids.shape[1] > 1 else None
        if tokens is not None and bool(self.backbone.vision_mask(tokens).any()):
            raise PruningError(
                "vision tokens arrived on a cache that already holds a prompt: chunked prefill cannot be "
                "pruned, and a later turn with a new image needs the whole conversation on a fresh cache"
            )
        return _Continuation(prompt, kwargs.get("attention_mask"))

    # ---- the decoder

    def before_decoder(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        """Pre-hook of the text model."""
        forward = self._forward
        if forward is None:
            raise PruningError("call the whole model inside `pruned`, not a part of it")
        self._watch.start("prefill" if isinstance(forward, _Prefill) else "decode")
        embeddings = kwargs.get("inputs_embeds")
        if isinstance(forward, _Prefill) and forward.plan and embeddings is not None:
            kwargs = dict(kwargs)
            forward.deepstack = deepstack.take_features(kwargs, embeddings)
            if self._merged and any(layer > min(forward.plan) for layer in forward.deepstack):
                raise PruningError(
                    f"this backbone adds features to vision tokens up to layer {max(forward.deepstack)}, which a merged "
                    "token cannot take in; let the first stage come later, or use residual 'none'"
                )
            if self._separators:
                given = [embeddings, *forward.deepstack.values()]
                forward.separators = separator_mask(self._separators, given, forward.vision)
            return args, kwargs
        return None

    def after_decoder(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Hook of the text model."""
        forward, self._forward = self._forward, None
        prefill = isinstance(forward, _Prefill)
        self._watch.stop("prefill" if prefill else "decode")
        if isinstance(forward, _Prefill) and forward.restore:
            return restore_length(output, forward.prompt)
        return None

    def before_layer(self, layer: int) -> Callable[..., Arguments | None]:
        """The pre-hook of decoder layer ``layer``."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            forward = self._forward
            # Most layers get their hidden states by place, a few by name.
            hidden = args[0] if args else kwargs["hidden_states"]
            if isinstance(forward, _Prefill):
                shortened = self._prefill_layer(forward, layer, hidden, args[1:], kwargs)
            else:
                assert forward is not None
                shortened = self._continue_layer(forward, layer, hidden, args[1:], kwargs)
            if shortened is None:
                return None
            hidden, others, kwargs = shortened
            return ((hidden, *others), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

        return hook

    def after_queries(self, layer: int, temperature: Temperature) -> Callable[..., Tensor | None]:
        """The hook on the queries of decoder layer ``layer``, which the model scales by their place."""

        def hook(_module: nn.Module, _args: tuple[Any, ...], queries: Tensor) -> Tensor | None:
            forward = self._forward
            assert forward is not None
            prompt, segment = forward.prompt, forward.prompt.of(layer, queries.device)
            if prompt.segment_of_layer[layer] == 0:
                return None  # nothing has left yet
            here = torch.arange(queries.shape[1], device=queries.device)
            if isinstance(forward, _Prefill):
                last, positions, places = prompt.length, segment.index, here
            else:
                generated = forward.made["cache", layer][0]
                last = prompt.length + generated + queries.shape[1]
                positions, places = prompt.length + generated + here, segment.width + generated + here
            if last < temperature.floor:
                return None
            return (queries * temperature.correction(positions, places)).to(queries.dtype)

        return hook

    # ---- a prompt

    def _prefill_layer(
        self,
        forward: _Prefill,
        layer: int,
        hidden: Tensor,
        others: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]] | None:
        prompt = forward.prompt
        if layer == 0 and (cache := kwargs.get("past_key_values")) is not None:
            cache.pruned_prompt = prompt
            self.record.cache = cache
        stage = forward.plan.get(layer - 1)
        if stage is not None:
            with self._watch.part("dropping"):
                hidden = self._drop(forward, stage, hidden)
        prompt.segment_of_layer[layer] = len(prompt.segments) - 1
        segment = prompt.of(layer, hidden.device)
        if (features := forward.deepstack.get(layer)) is not None:
            hidden = hidden + gather_positions(features.to(hidden.device), segment.index, 1)
        # Layers that only read another layer's keys may be given the prompt's last tokens alone (Gemma 4).
        last_only = hidden.shape[-2] != segment.width
        if len(prompt.segments) == 1 and not last_only:
            return None if features is None else (hidden, others, kwargs)

        kwargs = dict(kwargs)
        if not last_only:
            for name, value in kwargs.items():
                if name not in _LEFT_ALONE and not (self._renumbered and name in _NUMBERED):
                    kwargs[name] = self._cut(forward, name, value, segment)
        if kwargs.get("position_ids") is not None and self._kernel.startswith("flash"):
            # Flash attention reads gaps in the positions as packed sequences; it needs none of them.
            kwargs["position_ids"] = None
        kwargs["attention_mask"] = self._prefill_mask(
            forward, layer, kwargs.get("attention_mask"), hidden, segment
        )
        if not last_only:
            others = tuple(
                self._cut(forward, f"argument {place}", value, segment) for place, value in enumerate(others)
            )
        if self._renumbered:
            places = self._once(forward.gathered, "places", lambda: self._renumbered_places(segment))
            others = self._renumber(forward.gathered, layer, hidden, others, kwargs, places)
        return hidden, others, kwargs

    def _drop(self, forward: _Prefill, stage: StagePlan, hidden: Tensor) -> Tensor:
        before = forward.prompt.segments[-1].to(hidden.device)
        vision = forward.vision.to(hidden.device).gather(1, before.index) & before.valid
        keep = torch.tensor(stage.keep).to(hidden.device, non_blocking=True)
        protected = forward.separators
        if protected is not None:
            protected = protected.to(hidden.device).gather(1, before.index) & vision
        merged = None if before.weights is None else vision & (before.weights > 1)
        if isinstance(self.scorer, PositionScorer):
            scores = self._score_positions(vision, protected, before.index, keep)
        elif forward.scores is not None:
            scores = forward.scores.to(hidden.device)
        else:
            raise PruningError(
                f"layer {stage.layer} ran without its attention being seen; its kernel was bypassed"
            )
        first = protected if merged is None else merged if protected is None else protected | merged
        place, valid = select_kept(scores, vision, before.valid, keep, stage.width, first)
        weights = None
        if self._merged:
            if protected is not None:  # the last to take others in
                scores = scores.masked_fill(protected, torch.finfo(scores.dtype).max)
            state, weights = merge_dropped(hidden, before.weights, scores, vision, before.valid, place, valid)
        after = Segment(before.index.gather(1, place), valid, stage.filled, weights)
        forward.prompt.segments.append(after)
        forward.gathered.clear()
        kept_vision = vision.gather(1, place) & valid
        kept_scores = scores if self._keep_scores else None
        self.record.stages.append(StageRecord(stage.layer, stage.keep, after.index, kept_vision, kept_scores))
        if self._merged:
            return state
        sequence = hidden.dim() - 2
        if hidden.shape[sequence] != before.width:
            return hidden  # the model itself went on with its last tokens only; they are still there
        return gather_positions(hidden, place, sequence)

    def _score_positions(
        self, vision: Tensor, protected: Tensor | None, position: Tensor, keep: Tensor
    ) -> Tensor:
        """Scores for the places that protected tokens leave free, so that a rule spreads over those alone."""
        assert isinstance(self.scorer, PositionScorer)
        if protected is not None:
            keep = (keep - protected.sum(1)).clamp(min=0)
            vision = vision & ~protected
        return self.scorer.score_positions(vision, position, keep, self.record.prefills - 1)

    def on_attention(self, inputs: AttentionInputs) -> None:
        """Score vision tokens where a stage follows; the listener of the tap."""
        forward, scorer = self._forward, self.scorer
        if not isinstance(forward, _Prefill) or inputs.layer not in forward.plan:
            return
        assert isinstance(scorer, AttentionScorer)
        with self._watch.part("scoring"):
            segment = forward.prompt.of(inputs.layer, inputs.query.device)
            is_rater = forward.raters.to(inputs.query.device).gather(1, segment.index) & segment.valid
            width = 1 if scorer.last_row_only else max(forward.num_raters, 1)
            rows, real = index_raters(is_rater, width, last_only=scorer.last_row_only)
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

    # ---- arguments that have one entry per position

    def _cut(self, forward: _Prefill, name: str, value: Any, segment: Segment) -> Any:
        """``value`` with one entry per place of the segment where it had one per position of the prompt."""
        if isinstance(value, tuple):
            return tuple(self._cut(forward, name, part, segment) for part in value)
        if not isinstance(value, Tensor) or not value.dim():
            return value
        sequence = _sequence_dimension(name, value, forward.prompt.length)
        if sequence is None:
            return value
        # Kept with the result, so that the id stays taken for as long as the entry lives.
        cut, _ = self._once(
            forward.gathered, id(value), lambda: (gather_positions(value, segment.index, sequence), value)
        )
        return cut

    def _once(self, made: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
        """``make()``, once for all layers that share ``made``."""
        if key not in made:
            made[key] = make()
        return made[key]

    def _prefill_mask(
        self, forward: _Prefill, layer: int, mask: Tensor | None, hidden: Tensor, segment: Segment
    ) -> Tensor | None:
        source = self.backbone.kv_sources[layer]
        keys = forward.prompt.of(source, hidden.device)
        attends = self.backbone.attends(layer)
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
            allowed = self._reach(layer).allows(queries, keys.index, first) & valid[:, None, :]
            made = kernel_mask(allowed, valid, self._kernel, hidden.dtype)
            return made if keys.weights is None else weighted_mask(made, keys.weights, hidden.dtype)

        key = ("mask", id(mask), source if keys is not segment else None, attends, self._reach(layer), rows)
        made, _ = self._once(forward.gathered, key, lambda: (make(), mask))
        return made

    def _renumber(
        self,
        made: dict[Any, Any],
        layer: int,
        hidden: Tensor,
        others: tuple[Any, ...],
        kwargs: dict[str, Any],
        places: Tensor,
    ) -> tuple[Any, ...]:
        """Give a layer the rotary table of ``places``; returns its positional arguments, changes the others.

        ``made`` is shared by all layers with these places.
        """
        name, make, at = self._rotary[layer]
        table = self._once(made, ("rotary", name), lambda: make(hidden, places))
        position_ids = kwargs.get("position_ids")
        if position_ids is not None:
            kwargs["position_ids"] = places.expand(*position_ids.shape[:-2], -1, -1)
        if TABLE in kwargs or at is None or at > len(others):
            kwargs[TABLE] = table
            return others
        return (*others[: at - 1], table, *others[at:])  # the hidden states come first

    def _renumbered_places(self, segment: Segment) -> Tensor:
        return (segment.valid.long().cumsum(1) - 1).clamp(min=0)

    def _reach(self, layer: int) -> Reach:
        config = self.backbone.text_model.config
        kind = self.backbone.layer_kinds[layer]
        if kind == "sliding_attention":
            return Reach(window=config.sliding_window)
        if kind == "chunked_attention":
            return Reach(chunk=config.attention_chunk_size)
        return Reach()

    # ---- generated tokens and later turns

    def _continue_layer(
        self,
        forward: _Continuation,
        layer: int,
        hidden: Tensor,
        others: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]] | None:
        prompt = forward.prompt
        if len(prompt.segments) == 1 or not self.backbone.attends(layer):
            return None
        queries = hidden.shape[-2]
        prompt.later_turns |= queries > 1
        source = self.backbone.kv_sources[layer]
        # Counted from the cache itself, so that cropping it (assisted decoding) is followed; and only where
        # the layer has not added its new keys yet, so layers that share keys read what their source found.
        # A layer that shares keys may get fewer queries than there are new tokens, which its source saw all.
        generated, keys_seen, new = self._once(
            forward.made, ("cache", source), lambda: self._cache_state(prompt, source, queries, kwargs)
        )
        # At the first layer that has keys to count; a hybrid may begin with recurrent ones.
        if not any(map(self.backbone.attends, range(layer))):
            self._check_rows_and_mask(forward, hidden, generated)
        segment = prompt.segment_of_layer[layer]
        reach = self._reach(layer)
        kwargs = dict(kwargs)
        kwargs["attention_mask"] = self._once(
            forward.made,
            ("mask", segment, prompt.segment_of_layer[source], reach, keys_seen, queries),
            lambda: self._continuation_mask(
                forward, layer, source, reach, generated + new, keys_seen, hidden
            ),
        )
        if self._renumbered and segment > 0:
            made = forward.made.setdefault(("numbering", segment), {})
            places = self._once(made, "places", lambda: self._later_places(prompt, layer, generated, hidden))
            others = self._renumber(made, layer, hidden, others, kwargs, places)
        return hidden, others, kwargs

    def _cache_state(
        self, prompt: PrunedPrompt, source: int, queries: int, kwargs: dict[str, Any]
    ) -> tuple[int, int, int]:
        """Tokens after the prompt that are cached already, keys that this call will see, and new tokens."""
        cached = kwargs["past_key_values"].layers[source]
        width = prompt.segments[prompt.segment_of_layer[source]].width
        return cached.get_seq_length() - width, cached.get_mask_sizes(queries)[0], queries

    def _continuation_mask(
        self,
        forward: _Continuation,
        layer: int,
        source: int,
        reach: Reach,
        later: int,
        keys_seen: int,
        hidden: Tensor,
    ) -> Tensor | None:
        """The mask of ``later`` tokens after the prompt, of which the last are this layer's queries."""
        prompt, device = forward.prompt, hidden.device
        segment, keys = prompt.of(layer, device), prompt.of(source, device)
        queries = hidden.shape[-2]
        plain = keys.weights is None and not segment.filled
        unmasked = plain and not (prompt.later_turns or reach.limited) and keys is segment
        if queries == 1 and unmasked:
            return None
        batch = len(segment.index)
        fresh = torch.arange(prompt.length, prompt.length + later, device=device).expand(batch, -1)
        fresh_valid = torch.ones_like(fresh, dtype=torch.bool)
        if prompt.later_turns and forward.attention_mask is not None:
            fresh_valid = forward.attention_mask[:, prompt.length :].bool().to(device)
        position = torch.cat([keys.index, fresh], 1)[:, -keys_seen:]
        valid = torch.cat([prompt.still_there(keys, segment), fresh_valid], 1)[:, -keys_seen:]
        allowed = reach.allows(fresh[:, -queries:], position, prompt.first(device)) & valid[:, None, :]
        made = kernel_mask(allowed, valid, self._kernel, hidden.dtype)
        if keys.weights is None:
            return made
        weights = torch.cat([keys.weights, torch.ones_like(fresh, dtype=torch.float32)], 1)[:, -keys_seen:]
        return weighted_mask(made, weights, hidden.dtype)

    def _later_places(self, prompt: PrunedPrompt, layer: int, generated: int, hidden: Tensor) -> Tensor:
        segment = prompt.of(layer, hidden.device)
        first = segment.valid.sum(1, keepdim=True) + generated
        return first + torch.arange(hidden.shape[-2], device=hidden.device)

    def _check_rows_and_mask(self, forward: _Continuation, hidden: Tensor, generated: int) -> None:
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
