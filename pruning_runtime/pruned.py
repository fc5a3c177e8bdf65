"""Apply a schedule to a stock model for as long as a ``with`` lasts.

Hooks on the decoder layers drop tokens from the hidden states and re-gather masks and rotary tables;
the attention tap supplies the scores. The model's own layer loop, kernels and cache are used as they
are: every layer simply sees a shorter sequence, and its cache holds exactly the tokens it saw.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from pruning_runtime.attention_rows import find_text_queries
from pruning_runtime.attention_tap import AttentionInputs, attention_tap
from pruning_runtime.backbone import Backbone, UnsupportedBackbone, find_backbone
from pruning_runtime.costs import pre_decoder_share, scores_before_decoder
from pruning_runtime.decode import Continuation, ContinuationPruner
from pruning_runtime.model_quirks import deepstack
from pruning_runtime.model_quirks.attention_temperature import Temperature, find_temperature
from pruning_runtime.model_quirks.image_newline import find_image_newlines, image_newline_mask
from pruning_runtime.prefill import Prefill, PrefillPruner
from pruning_runtime.record import Record, Stopwatch
from pruning_runtime.renumbering import Renumbering, why_not_renumbered
from pruning_runtime.schedule import Schedule, ScheduleError
from pruning_runtime.scorers import AttentionScorer, make_scorer
from pruning_runtime.selection import plan_stages
from pruning_runtime.sequence import PrunedPrompt, PruningError, Segment, restore_length
from pruning_runtime.static_prefill.graph import FastPrefill

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_in_use: WeakSet[nn.Module] = WeakSet()
_in_use_lock = threading.Lock()


@contextmanager
def pruned(
    model: PreTrainedModel,
    schedule: Schedule,
    *,
    vision_mask: Tensor | None = None,
    keep_scores: bool = False,
    timing: bool = False,
    fast: bool = False,
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
        fast: run prompts through the decoder at static shapes, captured as CUDA graphs: for small batches on a
            GPU, where launching kernels takes longer than running them. Each new shape is captured on first use
            (several prefills' time) and kept, with a prompt's keys and values, until the ``with`` ends, so let one
            ``with`` serve many prompts. A graph repeats what it recorded: leave the decoder's weights,
            adapters and own hooks alone until then.
            Prompts, and backbones, that cannot run so take the plain path, with one warning.

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
        pruner = _Pruner(backbone, schedule, vision_mask, keep_scores, timing, fast)
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
        if fast:
            undo.callback(pruner.close)
            undo.enter_context(_forward_replaced(backbone.text_model, pruner.decoder))
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


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module)  # an attribute of the instance is found before the class's
    before = own.get("forward")

    @functools.wraps(module.forward)  # models look at its signature
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    own["forward"] = replaced
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


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
    if schedule.dropped_tokens == "merge" and (reason := why_not_merged(backbone)) is not None:
        raise UnsupportedBackbone(f"{family}: {reason}; use dropped_tokens 'discard'")
    if not make_scorer(schedule.scorer.name, schedule.scorer.options).needs_attention:
        return
    for stage in schedule.stages:
        if not backbone.has_own_attention(max(stage.layer, 0)):  # before the decoder, layer 0 is looked at
            usable = [layer for layer in range(len(backbone.layers)) if backbone.has_own_attention(layer)]
            raise ScheduleError(
                f"stages: layer {max(stage.layer, 0)} of {family} has no keys of its own to score with "
                f"({backbone.layer_kinds[max(stage.layer, 0)]}); scorer {schedule.scorer.name!r} can stand at {usable}"
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


class _Pruner:
    """The hooks of one `pruned`."""

    def __init__(
        self,
        backbone: Backbone,
        schedule: Schedule,
        vision_mask: Tensor | None,
        keep_scores: bool,
        timing: bool,
        fast: bool,
    ) -> None:
        self.backbone = backbone
        self.scorer = make_scorer(schedule.scorer.name, schedule.scorer.options)
        self._watch = Stopwatch(next(backbone.text_model.parameters()).device, timing)
        pre_decoder = scores_before_decoder(schedule.stages, schedule.scorer.name)
        self.record = Record(
            num_layers=backbone.shape.num_layers,
            pre_decoder_share=pre_decoder_share(backbone.shape) if pre_decoder else 0.0,
            watch=self._watch,
        )
        self._stages = schedule.stages
        protected = schedule.image_newlines == "protected"
        self._image_newlines = find_image_newlines(backbone.model, backbone.text_model) if protected else ()
        self._given_vision = vision_mask
        decoder = backbone.text_model, backbone.layers, backbone.layer_kinds
        renumbering = Renumbering(*decoder) if schedule.positions == "renumbered" else None
        self._prefill = PrefillPruner(backbone, schedule, self.scorer, renumbering, self._watch, keep_scores)
        self._continuation = ContinuationPruner(backbone, renumbering)
        self._forward: Prefill | Continuation | None = None
        self._restore = False
        self._plain_decoder = backbone.text_model.forward
        self._fast = (
            FastPrefill(backbone, self.scorer, self.record, self._plain_decoder, self._run_static)
            if fast
            else None
        )

    # ---- the model: what kind of call is this, and what will each stage keep

    def before_model(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the whole model."""
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            self._forward = self._begin(input_ids, cache, kwargs)
        else:
            self._forward = self._continue(input_ids, cache, kwargs)

    def _begin(self, input_ids: Tensor | None, cache: Cache | None, kwargs: dict[str, Any]) -> Prefill:
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
        text_queries = find_text_queries(vision, valid)
        # The one transfer to the host: three counts per row, before the decoder starts.
        counts = torch.stack([vision.sum(1), valid.sum(1), text_queries.sum(1)]).tolist()
        num_vision, num_valid, num_text_queries = counts
        num_other = [total - seen for total, seen in zip(num_valid, num_vision, strict=True)]
        plan = plan_stages(self._stages, num_vision, num_other)

        keep = torch.tensor([stage.keep for stage in plan]).to(vision.device, non_blocking=True)
        batch, length = vision.shape
        position = torch.arange(length, device=vision.device).expand(batch, length)
        whole = Segment(position, valid, filled=min(num_valid) < length)
        self.record.begin_prefill(num_vision, num_other)
        # Logits of the last token alone need no place of their own.
        self._restore = bool(plan) and kwargs.get("logits_to_keep", 0) != 1
        return Prefill(
            prompt=PrunedPrompt(length, [whole]),
            number=self.record.prefills - 1,
            vision=vision,
            text_queries=text_queries,
            num_text_queries=max(num_text_queries),
            plan={stage.layer: stage for stage in plan},
            keep={stage.layer: row for stage, row in zip(plan, keep, strict=True)},
            stages=self.record.stages,
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

    def _continue(self, input_ids: Tensor | None, cache: Cache, kwargs: dict[str, Any]) -> Continuation:
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
        return Continuation(prompt, kwargs.get("attention_mask"))

    # ---- the decoder

    def before_decoder(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        """Pre-hook of the text model."""
        forward = self._forward
        if forward is None:
            raise PruningError("call the whole model inside `pruned`, not a part of it")
        self._watch.start("prefill" if isinstance(forward, Prefill) else "decode")
        embeddings = kwargs.get("inputs_embeds")
        if isinstance(forward, Prefill) and (forward.plan or self._fast) and embeddings is not None:
            kwargs = dict(kwargs)
            forward.deepstack = deepstack.take_features(kwargs, embeddings)
            if self._image_newlines:
                given = [embeddings, *forward.deepstack.values()]
                forward.image_newlines = image_newline_mask(self._image_newlines, given, forward.vision)
            return args, kwargs
        return None

    def decoder(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the text model's forward on the fast path."""
        if self._fast is not None and isinstance(self._forward, Prefill):
            return self._fast(self._forward, args, kwargs)
        return self._plain_decoder(*args, **kwargs)

    def close(self) -> None:
        """Give the fast path's memory back: references in a circle would keep it until some later day."""
        if self._fast is not None:
            self._fast.close()

    def _run_static(self, prefill: Prefill, arguments: dict[str, Any]) -> Any:
        forward, self._forward = self._forward, prefill
        try:
            with self._watch.paused():  # events inside a captured graph cannot be read
                return self._plain_decoder(**arguments)
        finally:
            self._forward = forward

    def after_decoder(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Hook of the text model."""
        forward, self._forward = self._forward, None
        if not isinstance(forward, Prefill):
            self._watch.stop("decode")
            return None
        self._watch.stop("prefill")
        self.record.cache = forward.cache
        return restore_length(output, forward.prompt) if self._restore else None

    def before_layer(self, layer: int) -> Callable[..., Arguments | None]:
        """The pre-hook of decoder layer ``layer``."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            forward = self._forward
            # Most layers get their hidden states by place, a few by name.
            hidden = args[0] if args else kwargs["hidden_states"]
            if isinstance(forward, Prefill):
                shortened = self._prefill.before_layer(forward, layer, hidden, args[1:], kwargs)
            else:
                assert forward is not None
                shortened = self._continuation.before_layer(forward, layer, hidden, args[1:], kwargs)
            if shortened is None:
                return None
            hidden, others, kwargs = shortened
            return ((hidden, *others), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

        return hook

    def on_attention(self, inputs: AttentionInputs) -> None:
        """The listener of the tap."""
        if isinstance(self._forward, Prefill):
            self._prefill.on_attention(self._forward, inputs)

    def after_queries(self, layer: int, temperature: Temperature) -> Callable[..., Tensor | None]:
        """The hook on the queries of decoder layer ``layer``, which the model scales by their place."""

        def hook(_module: nn.Module, _args: tuple[Any, ...], queries: Tensor) -> Tensor | None:
            forward = self._forward
            assert forward is not None
            prompt, segment = forward.prompt, forward.prompt.of(layer, queries.device)
            if prompt.segment_of_layer[layer] == 0:
                return None  # nothing has left yet
            here = torch.arange(queries.shape[1], device=queries.device)
            if isinstance(forward, Prefill):
                last, positions, places = prompt.length, segment.index, here
            else:
                generated = forward.made["cache", layer][0]
                last = prompt.length + generated + queries.shape[1]
                positions, places = prompt.length + generated + here, segment.width + generated + here
            if last < temperature.floor:
                return None
            return (queries * temperature.correction(positions, places)).to(queries.dtype)

        return hook
