"""Apply a schedule to a stock model for as long as a ``with`` lasts.

Hooks on the decoder layers drop tokens from the hidden states and re-gather masks and rotary tables;
the attention tap supplies the scores. The model's own layer loop, kernels and cache are used as they
are: every layer simply sees a shorter sequence, and its cache holds exactly the tokens it saw.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
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
from pruning_runtime.drop_tokens import StagePlan, gather_positions, plan_stages, select_kept
from pruning_runtime.record import Record, StageRecord, Stopwatch
from pruning_runtime.schedule import Schedule
from pruning_runtime.scorers import PositionScorer, make_scorer

_in_use: WeakSet[nn.Module] = WeakSet()
_in_use_lock = threading.Lock()


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
    _refuse_unsupported(backbone, schedule)
    with _exclusive(model), ExitStack() as undo:
        pruner = _Pruner(backbone, schedule, vision_mask, keep_scores, timing)
        hooks = [
            model.register_forward_pre_hook(pruner.before_model, with_kwargs=True),
            backbone.text_model.register_forward_pre_hook(pruner.before_decoder, with_kwargs=True),
            backbone.text_model.register_forward_hook(pruner.after_decoder),
        ]
        for layer, block in enumerate(backbone.layers):
            hooks.append(block.register_forward_pre_hook(pruner.before_layer(layer), with_kwargs=True))
        for hook in hooks:
            undo.callback(hook.remove)
        if pruner.scorer.needs_attention:
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


def _refuse_unsupported(backbone: Backbone, schedule: Schedule) -> None:
    model, family = backbone.model, type(backbone.model).__name__
    generation = getattr(model, "generation_config", None)
    if model.training and getattr(model, "is_gradient_checkpointing", False):
        raise UnsupportedBackbone(f"{family}: pruning is for inference; call model.eval() first")
    if getattr(generation, "prefill_chunk_size", None):
        raise UnsupportedBackbone(f"{family}: generation_config.prefill_chunk_size must be None to prune")
    if "static" in (getattr(generation, "cache_implementation", None) or ""):
        raise UnsupportedBackbone(
            f"{family}: a static cache has one length for all layers; use the dynamic one"
        )
    rope = getattr(backbone.text_model.config, "rope_parameters", None) or {}
    if schedule.positions == "renumbered" and "mrope_section" in rope:
        raise UnsupportedBackbone(f"{family}: positions 'renumbered' is undefined for M-RoPE; use 'original'")


@dataclass(frozen=True)
class _Segment:
    """The sequence that a run of consecutive layers sees.

    ``index`` (``[batch, width]``) holds the original position of each place, ``valid`` whether it is
    a real token. ``masked``: some place is not, so a mask is needed.
    """

    index: Tensor
    valid: Tensor
    masked: bool

    @property
    def width(self) -> int:
        return self.index.shape[1]


@dataclass
class _PrunedPrompt:
    """Which tokens of a prompt each layer kept. It travels with the prompt's cache."""

    length: int
    segments: list[_Segment]
    segment_of_layer: dict[int, int] = field(default_factory=dict)
    later_turns: bool = False
    """More than one token was added at once, so tokens after the prompt may be padding."""

    def segment(self, layer: int) -> _Segment:
        return self.segments[self.segment_of_layer[layer]]


@dataclass
class _Forward:
    """One call of the model: a prefill, or a continuation on a cache."""

    prefill: bool
    prompt: _PrunedPrompt
    vision: Tensor | None = None
    raters: Tensor | None = None
    num_raters: int = 0
    plan: dict[int, StagePlan] = field(default_factory=dict)
    scores: Tensor | None = None
    attention_mask: Tensor | None = None
    restore: bool = False
    gathered: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    """Arguments already gathered for the current segment; the same objects reach every layer."""


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
        self.schedule = schedule
        self.scorer = make_scorer(schedule.scorer.name, schedule.scorer.options)
        self.record = Record(num_layers=backbone.shape.num_layers)
        self._given_vision = vision_mask
        self._keep_scores = keep_scores
        self._watch = Stopwatch(next(backbone.text_model.parameters()).device, timing)
        self._kernel = backbone.text_model.config._attn_implementation
        self._forward: _Forward | None = None

    # ---- the model's forward: what kind of call is this, and what will each stage keep

    def before_model(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            self._forward = self._begin_prefill(args, kwargs)
        else:
            self._forward = self._continue(cache, args, kwargs)

    def _begin_prefill(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Forward:
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if (cache := kwargs.get("past_key_values")) is not None:
            _refuse_static(cache)
        vision = self._vision(input_ids, kwargs.get("inputs_embeds"))
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise PruningError(f"attention_mask must be [batch, length], found shape {tuple(mask.shape)}")
        valid = torch.ones_like(vision) if mask is None else mask.bool().to(vision.device)
        vision = vision & valid
        raters = find_raters(vision, valid)
        # The one transfer to the host: three counts per row, before the decoder starts.
        num_vision, num_valid, num_raters = torch.stack([vision.sum(1), valid.sum(1), raters.sum(1)]).tolist()
        num_other = [total - seen for total, seen in zip(num_valid, num_vision, strict=True)]
        stages = plan_stages(self.schedule.stages, num_vision, num_other)

        batch, length = vision.shape
        position = torch.arange(length, device=vision.device).expand(batch, length)
        everything = _Segment(position, valid, masked=min(num_valid) < length)
        self._start_record(num_vision, num_other)
        return _Forward(
            prefill=True,
            prompt=_PrunedPrompt(length, [everything]),
            vision=vision,
            raters=raters,
            num_raters=max(num_raters),
            plan={stage.layer: stage for stage in stages},
            attention_mask=mask,
            restore=bool(stages) and kwargs.get("logits_to_keep", 0) != 1,
        )

    def _vision(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if self._given_vision is not None:
            given = self._given_vision.bool()
            expected = (input_ids if input_ids is not None else inputs_embeds).shape[:2]
            if given.shape != expected:
                raise PruningError(f"vision_mask is {tuple(given.shape)}, the prompt is {tuple(expected)}")
            return given
        if input_ids is None:
            raise PruningError(
                "a prompt given as inputs_embeds needs pruned(..., vision_mask=[batch, length])"
            )
        return self.backbone.vision_mask(input_ids)

    def _start_record(self, num_vision: Sequence[int], num_other: Sequence[int]) -> None:
        record = self.record
        record.prefills += 1
        record.num_vision, record.num_other = tuple(num_vision), tuple(num_other)
        record.stages = []
        record.cache = None

    def _continue(self, cache: Cache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Forward:
        prompt = getattr(cache, "pruned_prompt", None)
        if prompt is None:
            raise PruningError(
                "this cache was filled outside `pruned`, so which tokens it holds is unknown; "
                "run the whole prompt inside the `with`"
            )
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        # Looked at only where several tokens come at once: a generated token costs no host transfer.
        several = input_ids is not None and input_ids.shape[1] > 1
        if several and bool(self.backbone.vision_mask(input_ids).any()):
            raise PruningError(
                "vision tokens arrived on a cache that already holds a prompt: chunked prefill cannot be pruned, "
                "and a later turn with a new image needs the whole conversation on a fresh cache"
            )
        return _Forward(prefill=False, prompt=prompt, attention_mask=kwargs.get("attention_mask"))

    # ---- the decoder

    def before_decoder(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._forward is None:
            raise PruningError("call the whole model inside `pruned`, not a part of it")
        self._watch.start("prefill" if self._forward.prefill else "decode")

    def after_decoder(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        forward, self._forward = self._forward, None
        self._watch.stop("prefill" if forward.prefill else "decode")
        self.record.milliseconds = self._watch.sums()
        if forward.restore:
            return _restore_length(output, forward.prompt)
        return None

    def before_layer(self, layer: int) -> Any:
        """The pre-hook of decoder layer ``layer``."""

        def hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            forward = self._forward
            if forward.prefill:
                return self._prefill_layer(forward, layer, args, kwargs)
            return self._continue_layer(forward, layer, args, kwargs)

        return hook

    def _prefill_layer(
        self, forward: _Forward, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        prompt = forward.prompt
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer == 0 and (cache := kwargs.get("past_key_values")) is not None:
            cache.pruned_prompt = prompt
            self.record.cache = cache
        stage = forward.plan.get(layer - 1)
        if stage is not None:
            with self._watch.part("dropping"):
                hidden = self._drop(forward, stage, hidden)
        prompt.segment_of_layer[layer] = len(prompt.segments) - 1
        if len(prompt.segments) == 1:
            return None
        kwargs = self._gather_arguments(forward, kwargs, hidden)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _drop(self, forward: _Forward, stage: StagePlan, hidden: Tensor) -> Tensor:
        before = forward.prompt.segments[-1]
        vision = forward.vision.gather(1, before.index)
        keep = torch.tensor(stage.keep).to(hidden.device, non_blocking=True)
        if isinstance(self.scorer, PositionScorer):
            scores = self.scorer.score_positions(vision, before.index, keep, self.record.prefills - 1)
        else:
            scores = forward.scores
        place, valid = select_kept(scores, vision, before.valid, keep, stage.width)
        after = _Segment(before.index.gather(1, place), valid, masked=stage.filled)
        forward.prompt.segments.append(after)
        forward.gathered.clear()
        self.record.stages.append(
            StageRecord(
                stage.layer,
                stage.keep,
                after.index,
                vision.gather(1, place) & valid,
                scores if self._keep_scores else None,
            )
        )
        return gather_positions(hidden, place, 1)

    def on_attention(self, inputs: AttentionInputs) -> None:
        """Score vision tokens where a stage follows; the listener of the tap."""
        forward = self._forward
        if forward is None or not forward.prefill or inputs.layer not in forward.plan:
            return
        with self._watch.part("scoring"):
            segment = forward.prompt.segments[-1]
            is_rater = forward.raters.gather(1, segment.index) & segment.valid
            width = 1 if self.scorer.last_row_only else max(forward.num_raters, 1)
            rows, real = index_raters(is_rater, width, last_only=self.scorer.last_row_only)
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
            forward.scores = sum(self.scorer.score_heads(block, rows, real) for block in blocks)

    # ---- arguments that have one entry per position

    def _gather_arguments(self, forward: _Forward, kwargs: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
        segment = forward.prompt.segments[-1]
        kwargs = dict(kwargs)
        kwargs["attention_mask"] = self._once(
            forward,
            kwargs.get("attention_mask"),
            lambda mask: self._prefill_mask(mask, segment, hidden.dtype),
        )
        position_ids = kwargs.get("position_ids")
        if position_ids is not None:
            # Flash attention reads gaps in the positions as packed sequences; it needs none of them.
            flash = self._kernel.startswith("flash")
            kwargs["position_ids"] = (
                None
                if flash
                else self._once(forward, position_ids, lambda ids: gather_positions(ids, segment.index, 1))
            )
        if self.schedule.positions == "renumbered":
            places = (segment.valid.long().cumsum(1) - 1).clamp(min=0)
            kwargs["position_embeddings"] = self._rotary(forward, hidden, places)
        elif kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = tuple(
                self._once(forward, table, lambda table: gather_positions(table, segment.index, 1))
                for table in kwargs["position_embeddings"]
            )
        return kwargs

    def _once(self, forward: _Forward, source: Any, make: Any) -> Any:
        """``make(source)``, computed for the first layer of a segment and reused by the others."""
        key = ("gathered", id(source))
        if key not in forward.gathered:
            # The source is kept as well: its id stays taken for as long as the entry lives.
            forward.gathered[key] = (make(source), source)
        return forward.gathered[key][0]

    def _rotary(self, forward: _Forward, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        key = ("rotary", places.shape[1])
        if key not in forward.gathered:
            forward.gathered[key] = self.backbone.text_model.rotary_emb(hidden, position_ids=places)
        return forward.gathered[key]

    def _prefill_mask(self, mask: Tensor | None, segment: _Segment, dtype: torch.dtype) -> Tensor | None:
        if mask is None:
            if not segment.masked:
                return None
            # Places are in the order of their positions wherever they are valid: causal as they stand.
            place = torch.arange(segment.width, device=segment.index.device)
            allowed = (place <= place[:, None]) & segment.valid[:, None, :]
            return self._as_kernel_mask(allowed, segment.valid, dtype)
        if mask.dim() == 2:
            return gather_positions(mask, segment.index, 1) * segment.valid
        mask = gather_positions(gather_positions(mask, segment.index, 2), segment.index, 3)
        blocked = ~segment.valid[:, None, None, :]
        return mask.masked_fill(blocked, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)

    def _as_kernel_mask(self, allowed: Tensor, keys_valid: Tensor, dtype: torch.dtype) -> Tensor:
        """``allowed`` (``[batch, queries, keys]``) in the convention of the model's kernel."""
        if self._kernel.startswith("flash"):
            return keys_valid
        allowed = allowed[:, None]
        if self._kernel == "eager":
            return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
        return allowed

    # ---- generated tokens and later turns

    def _continue_layer(
        self, forward: _Forward, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        prompt = forward.prompt
        if len(prompt.segments) == 1:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer == 0:
            self._check_continuation(forward, kwargs["past_key_values"], hidden)
        segment = prompt.segment(layer)
        cached = kwargs["past_key_values"].layers[layer]
        # Counted from the cache itself, so that cropping it (assisted decoding) is followed.
        generated = cached.get_seq_length() - segment.width
        queries = hidden.shape[1]
        prompt.later_turns |= queries > 1
        window = self._window(layer)
        kwargs = dict(kwargs)
        key = ("decode mask", prompt.segment_of_layer[layer], window)
        if key not in forward.gathered:
            forward.gathered[key] = self._continuation_mask(
                forward, segment, generated, queries, window, cached, hidden
            )
        kwargs["attention_mask"] = forward.gathered[key]
        if self.schedule.positions == "renumbered" and prompt.segment_of_layer[layer] > 0:
            first = segment.valid.sum(1, keepdim=True) + generated
            places = first + torch.arange(queries, device=hidden.device)
            key = ("decode rotary", prompt.segment_of_layer[layer])
            if key not in forward.gathered:
                forward.gathered[key] = self.backbone.text_model.rotary_emb(hidden, position_ids=places)
            kwargs["position_embeddings"] = forward.gathered[key]
        return args, kwargs

    def _window(self, layer: int) -> int | None:
        if self.backbone.layer_kinds[layer] != "sliding_attention":
            return None
        return self.backbone.text_model.config.sliding_window

    def _check_continuation(self, forward: _Forward, cache: Cache, hidden: Tensor) -> None:
        rows = forward.prompt.segments[0].index.shape[0]
        if hidden.shape[0] != rows:
            raise PruningError(f"the cache was filled with {rows} rows, this call has {hidden.shape[0]}")
        segment = forward.prompt.segment(0)
        total = forward.prompt.length + cache.layers[0].get_seq_length() - segment.width + hidden.shape[1]
        mask = forward.attention_mask
        if mask is not None and mask.dim() == 2 and mask.shape[1] != total:
            raise PruningError(
                f"attention_mask covers {mask.shape[1]} tokens, prompt and continuation have {total}; "
                "later turns need the mask of the whole conversation"
            )

    def _continuation_mask(
        self,
        forward: _Forward,
        segment: _Segment,
        generated: int,
        queries: int,
        window: int | None,
        cached: Any,
        hidden: Tensor,
    ) -> Tensor | None:
        prompt, length = forward.prompt, forward.prompt.length
        if queries == 1 and not segment.masked and not prompt.later_turns and window is None:
            return None
        keys = cached.get_mask_sizes(queries)[0]
        batch, device = hidden.shape[0], hidden.device
        fresh = torch.arange(length, length + generated + queries, device=device)
        fresh_valid = torch.ones(batch, len(fresh), dtype=torch.bool, device=device)
        if prompt.later_turns and forward.attention_mask is not None:
            fresh_valid = forward.attention_mask[:, length:].bool()
        position = torch.cat([segment.index, fresh.expand(batch, -1)], 1)[:, -keys:]
        valid = torch.cat([segment.valid, fresh_valid], 1)[:, -keys:]
        query = fresh[-queries:]
        allowed = valid[:, None, :] & (position[:, None, :] <= query[:, None])
        if window is not None:
            allowed = allowed & (query[:, None] - position[:, None, :] < window)
        return self._as_kernel_mask(allowed, valid, hidden.dtype)


def _refuse_static(cache: Cache) -> None:
    if getattr(cache, "is_compileable", False):
        raise UnsupportedBackbone(
            f"{type(cache).__name__} has one fixed length for all layers; use a DynamicCache to prune"
        )


def _restore_length(output: Any, prompt: _PrunedPrompt) -> Any:
    """Put the decoder's last hidden states back to their original places, zeros where dropped."""
    last = prompt.segments[-1]
    hidden = output[0]
    hidden = hidden.masked_fill(~last.valid[..., None], 0)
    restored = hidden.new_zeros(hidden.shape[0], prompt.length, hidden.shape[2])
    restored.scatter_(1, last.index[..., None].expand_as(hidden), hidden)
    if isinstance(output, tuple):
        return (restored, *output[1:])
    output.last_hidden_state = restored
    return output
