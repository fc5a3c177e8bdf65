"""The hooks of one ``with pruned(...)``: they pass each call to its `Prefill` or `Continuation`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from pruning_runtime.attention_tap import AttentionInputs
from pruning_runtime.cache_guard import attached_prompt
from pruning_runtime.costs import pre_decoder_share
from pruning_runtime.decode import Continuation
from pruning_runtime.errors import PruningError
from pruning_runtime.model_quirks.attention_temperature import Temperature
from pruning_runtime.prefill import Prefill
from pruning_runtime.preflight import check_continuation, check_prompt, find_vision
from pruning_runtime.record import Record
from pruning_runtime.setup import PruningSetup
from pruning_runtime.static_prefill.runner import StaticPrefill

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class PruningSession:
    """The state between the hooks of one call, and the record of all calls.

    Args:
        setup: the schedule prepared for the backbone.
        vision_mask: vision tokens of a prompt given as embeddings, bool ``[batch, length]``.
        static: run prompts at static shapes.
        answer_length: last positions of each prompt that are a given answer.
    """

    def __init__(
        self, setup: PruningSetup, vision_mask: Tensor | None, static: bool, answer_length: int
    ) -> None:
        self._setup, self._watch = setup, setup.watch
        first = setup.stages[0] if setup.stages else None
        scored = first is not None and first.layer == -1 and first.keep_ratio < 1
        pre_decoder = scored and setup.scorers[-1].needs_attention
        self.record = Record(
            num_layers=setup.backbone.shape.num_layers,
            pre_decoder_share=pre_decoder_share(setup.backbone.shape) if pre_decoder else 0.0,
            feature_share=setup.feature_share,
            watch=setup.watch,
        )
        self.applied: object = None
        """What installed the hooks; kept as long as they are."""
        self._given_vision, self._answer_length = vision_mask, answer_length
        self._call: Prefill | Continuation | None = None
        self._restore = False
        # Of the class: an instance's forward may be somebody's wrapper.
        self._parameters = list(inspect.signature(type(setup.backbone.model).forward).parameters)[1:]
        self._plain_decoder = setup.backbone.text_model.forward
        self._static = (
            StaticPrefill(setup, self.record, self._plain_decoder, self._run_static) if static else None
        )

    def close(self) -> None:
        """End the use of all caches, and free the memory of static shapes."""
        self._setup.lease.is_open = False
        if self._static is not None:
            self._static.close()

    # ---- the model

    def before_model(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the whole model: a prompt, or tokens after one."""
        arguments = dict(zip(self._parameters, args, strict=False)) | kwargs
        cache = arguments.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            self._call = self._begin(cache, arguments)
        else:
            self._call = self._continue(cache, arguments)

    def _begin(self, cache: Cache | None, arguments: dict[str, Any]) -> Prefill:
        """The prefill of a new prompt; ``arguments`` are the model's."""
        check_prompt(cache, arguments)
        vision = find_vision(
            self._setup.backbone,
            self._given_vision,
            arguments.get("input_ids"),
            arguments.get("inputs_embeds"),
        )
        mask = arguments.get("attention_mask")
        valid = torch.ones_like(vision) if mask is None else mask.bool().to(vision.device)
        prefill = Prefill.begin(self._setup, vision & valid, valid, self.record, self._answer_length)
        # The last logits alone do not depend on positions in the output.
        kept = arguments.get("logits_to_keep", 0)
        self._restore = bool(prefill.plan) and not (isinstance(kept, int) and kept == 1)
        return prefill

    def _continue(self, cache: Cache, arguments: dict[str, Any]) -> Continuation:
        """The continuation of the prompt in ``cache``; ``arguments`` are the model's."""
        prompt = attached_prompt(cache)
        if prompt is None:
            raise PruningError(
                "this cache was filled outside `pruned`, so which tokens it holds is unknown; "
                "run the whole prompt inside the `with`"
            )
        check_continuation(self._setup.backbone, arguments, after_vision=prompt.has_vision)
        return Continuation(self._setup, prompt, arguments.get("attention_mask"))

    # ---- the decoder

    def before_decoder(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        """Pre-hook of the text model."""
        if self._setup.tower is not None and self._setup.tower.probing:
            return None
        call = self._call
        if call is None:
            raise PruningError("call the whole model inside `pruned`, not a part of it")
        self._watch.start("prefill" if isinstance(call, Prefill) else "decode")
        embeddings = kwargs.get("inputs_embeds")
        if isinstance(call, Prefill) and (call.plan or self._static) and embeddings is not None:
            kwargs = dict(kwargs)
            call.take_features(kwargs)
            return args, kwargs
        return None

    def decoder(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces the text model's forward where prompts run at static shapes."""
        if self._static is not None and isinstance(self._call, Prefill):
            return self._static(self._call, args, kwargs)
        return self._plain_decoder(*args, **kwargs)

    def _run_static(self, prefill: Prefill, arguments: dict[str, Any]) -> Any:
        """Run the decoder on static buffers with the hooks working on ``prefill``."""
        call, self._call = self._call, prefill
        try:
            with self._watch.paused():  # events inside a captured graph cannot be read
                return self._plain_decoder(**arguments)
        finally:
            self._call = call

    def after_decoder(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Hook of the text model."""
        call, self._call = self._call, None
        if not isinstance(call, Prefill):
            self._watch.stop("decode")
            return None
        self._watch.stop("prefill")
        self.record.cache = call.cache
        return call.restore(output) if self._restore else None

    # ---- its layers

    def before_layer(self, layer: int) -> Callable[..., Arguments | None]:
        """The pre-hook of decoder layer ``layer``."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            assert self._call is not None
            # Most decoders pass hidden states by position, a few by name.
            hidden = args[0] if args else kwargs["hidden_states"]
            shortened = self._call.before_layer(layer, hidden, args[1:], kwargs)
            if shortened is None:
                return None
            hidden, others, kwargs = shortened
            return ((hidden, *others), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

        return hook

    def on_attention(self, inputs: AttentionInputs) -> None:
        """Receives the attention inputs of every layer."""
        if isinstance(self._call, Prefill):
            self._call.on_attention(inputs)

    def after_queries(self, layer: int, temperature: Temperature) -> Callable[..., Tensor | None]:
        """The hook on the query map of a decoder layer that scales queries by their position in the cache."""

        def hook(_module: nn.Module, _args: tuple[Any, ...], queries: Tensor) -> Tensor | None:
            assert self._call is not None
            if self._call.prompt.segment_of_layer[layer] == 0:
                return None  # nothing was dropped yet
            end, original, in_cache = self._call.query_positions(layer, queries)
            if end < temperature.floor:
                return None
            return (queries * temperature.correction(original, in_cache)).to(queries.dtype)

        return hook
