"""Prefill at static shapes, captured once per shape as a CUDA graph and replayed.

For small batches, launching a pruned layer's kernels takes longer than running them. Here a prompt is padded on the
left to one of a few lengths, every stage to one of a few widths, and the decoder with its stages runs as one graph on
static buffers. The results are cut to the widths of the plain path, so that caches, records and generated tokens are
the same.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils.generic import ModelOutput

from pruning_runtime.cache_guard import plain_type
from pruning_runtime.masks import AttentionSpan
from pruning_runtime.prefill import Prefill
from pruning_runtime.preflight import why_not_static
from pruning_runtime.record import Record, StageRecord
from pruning_runtime.scoring import PromptCounts
from pruning_runtime.setup import PruningSetup
from pruning_runtime.static_prefill.graph import BufferName, Graph, StaticOutput
from pruning_runtime.static_prefill.padding import Padded, bucket, plain_segment

MOST_GRAPHS, MOST_BYTES = 16, 4 * 2**30
"""Limits of the graphs kept at once: their number, and their bytes together. The least recently used one is removed."""

_SERVED = frozenset({"inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache"})
_PLAIN_TYPES = (bool, int, type(None))


class _NotStatic(Exception):
    """Why a call cannot run at static shapes."""


class StaticPrefill:
    """Runs prompts at static shapes, and on the plain path where that is not possible.

    Args:
        setup: of the ``with``.
        record: counts the prompts on this path and the captured shapes.
        decoder: the text model's forward.
        run: ``run(prefill, arguments)`` calls ``decoder`` with the hooks working on ``prefill``.
    """

    def __init__(
        self,
        setup: PruningSetup,
        record: Record,
        decoder: Callable[..., Any],
        run: Callable[[Prefill, dict[str, Any]], Any],
    ) -> None:
        backbone = setup.backbone
        self._setup, self._record = setup, record
        self._decoder = decoder
        self._run = run
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._device = next(backbone.text_model.parameters()).device
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self._reason = why_not_static(backbone, setup.scorers.values())
        self._warned: set[str] = set()
        if self._reason is None and self._pool is None:
            self._warn(
                f"fast=True: there are no CUDA graphs on {self._device.type}, so the static shapes are run "
                "without capture; the results are right, but it is not faster"
            )

    def __call__(self, prefill: Prefill, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The decoder's output for the prompt of ``prefill``; other arguments are the decoder's."""
        try:
            if self._reason is not None:
                raise _NotStatic(self._reason)
            graph, pad = self._prepared(prefill, args, kwargs)
        except _NotStatic as reason:
            self._warn(f"fast=True: {reason}; the plain path runs instead")
            return self._decoder(*args, **kwargs)
        # Tensors made in inference mode could not be written to outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            output = graph.replay()
            return self._finish(prefill, graph, output, kwargs, pad)

    def close(self) -> None:
        """Free all graphs and their memory."""
        if self._graphs and self._pool is not None:
            torch.cuda.synchronize(self._device)  # the last of them may still be running
        self._graphs.clear()

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)

    # ---- before the run: pad, capture, write buffers

    def _prepared(self, prefill: Prefill, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Graph, int]:
        """The graph for a call with its buffers written, and the number of padding positions."""
        self._check(args, kwargs)
        embeds: Tensor = kwargs["inputs_embeds"]
        length = embeds.shape[1]
        width = bucket(length)
        plan = {
            layer: replace(stage, width=bucket(stage.width), padded=True, most_kept=bucket(stage.most_kept))
            for layer, stage in prefill.plan.items()
        }
        host = prefill.scoring.counts
        counts = PromptCounts(
            bucket(host.text_queries), bucket(host.vision), host.images, bucket(host.largest_image)
        )
        given = self._everything(prefill, kwargs)
        flags = {
            name: value
            for name, value in kwargs.items()
            if name not in _SERVED and isinstance(value, _PLAIN_TYPES)
        }
        key = (
            tuple((name, part.signature()) for name, part in given.items()),
            width,
            counts,
            tuple((layer, stage.width, stage.most_kept) for layer, stage in plan.items()),
            tuple(flags.items()),
        )
        graph = self._graphs.get(key)
        with torch.inference_mode(False), torch.no_grad():
            buffers = {n: part.buffer(width) for n, part in given.items()} if graph is None else graph.buffers
            for name, part in given.items():
                part.write(buffers[name])
            if graph is None:
                graph = Graph(self._setup, buffers, plan, counts, flags, self._run)
                self._capture(graph)
                self._graphs[key] = graph
                # A capture begins with a synchronization, so a removed graph is not running.
                while len(self._graphs) > 1 and (
                    len(self._graphs) > MOST_GRAPHS
                    or sum(graph.held_bytes for graph in self._graphs.values()) > MOST_BYTES
                ):
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
        return graph, width - length

    def _everything(self, prefill: Prefill, kwargs: dict[str, Any]) -> dict[BufferName, Padded]:
        """All tensors that a call of the decoder depends on."""
        embeds: Tensor = kwargs["inputs_embeds"]
        batch, length, _ = embeds.shape
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=embeds.device).expand(batch, -1)
        mask = kwargs.get("attention_mask")
        found: dict[BufferName, Padded] = {
            ("embeds", None): Padded(embeds, (1,), 0.0),
            ("positions", None): Padded(positions, (positions.dim() - 1,), 0),
            ("valid", None): Padded(prefill.prompt.segments[0].valid, (1,), False),
            ("vision", None): Padded(prefill.vision, (1,), False),
            ("text_queries", None): Padded(prefill.scoring.text_queries, (1,), False),
        }
        if prefill.image_newlines is not None:
            found["image_newlines", None] = Padded(prefill.image_newlines, (1,), False)
        for layer, features in prefill.deepstack.items():
            found["deepstack", layer] = Padded(features, (1,), 0.0)
        for name, value in kwargs.items():
            if name not in _SERVED and isinstance(value, Tensor):
                found["argument", name] = Padded(value, (1,), 0)
        for kind, whole in mask.items() if isinstance(mask, dict) else [(None, mask)]:
            if whole is None and kind is not None:
                whole = self._whole_mask(kind, prefill, embeds)
            if whole is not None and whole.dim() == 4:
                unseen = False if whole.dtype == torch.bool else torch.finfo(whole.dtype).min
                found["mask", kind] = Padded(whole, (2, 3), unseen)
        for layer, keep in prefill.keep.items():
            found["keep", layer] = Padded(keep, (), 0)
        return found

    def _whole_mask(self, kind: str, prefill: Prefill, embeds: Tensor) -> Tensor:
        """The mask that a model omitted because its kernel is causal; with padding it is needed."""
        whole = prefill.prompt.segments[0]
        span = AttentionSpan.of_kind(kind, self._setup.backbone.text_model.config)
        first = prefill.prompt.first(embeds.device)
        return self._setup.masks.build(span, whole.index, whole.index, whole.valid, first, embeds.dtype)

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise `_NotStatic` if a call of the decoder cannot run at static shapes."""
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        if args or embeds is None:
            raise _NotStatic("the decoder is not given `inputs_embeds` by name")
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            raise _NotStatic("gradients are enabled; call the model inside torch.inference_mode()")
        if torch.is_autocast_enabled(self._device.type):
            # Autocast frees its cast weights when it ends; a graph would still read them.
            raise _NotStatic("autocast is on; load the model in the dtype that it should run in")
        if cache is not None and (plain_type(cache) is not DynamicCache or cache.offloading):
            raise _NotStatic(f"{type(cache).__name__} is not a plain DynamicCache")
        for name, value in kwargs.items():
            padded = isinstance(value, Tensor) and value.shape[:2] == embeds.shape[:2]
            if not (name in _SERVED or padded or isinstance(value, _PLAIN_TYPES)):
                raise _NotStatic(f"the decoder's argument `{name}` cannot be padded")
            if name.startswith("output_") and value:
                raise _NotStatic(f"`{name}` requests more than the last hidden states")

    def _capture(self, graph: Graph) -> None:
        """Capture ``graph`` on CUDA. After a failure all prompts take the plain path."""
        if self._pool is not None:
            try:
                with torch.cuda.device(self._device):
                    graph.capture(self._pool)
            except RuntimeError as error:
                self._graphs.clear()
                # Ending a failed capture raises a second error, whose message says less.
                first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
                self._reason = f"this decoder could not be captured ({str(first).splitlines()[0]})"
                raise _NotStatic(self._reason) from error
        self._record.captures += 1

    # ---- after the run: cut to the widths of the plain path

    def _finish(
        self, prefill: Prefill, graph: Graph, output: StaticOutput, kwargs: dict[str, Any], pad: int
    ) -> ModelOutput:
        """Copy the results of a run to the prompt, the record and the cache; return the decoder's output."""
        prompt = prefill.prompt
        for stage, segment, made in zip(
            prefill.plan.values(), output.segments[1:], output.stages, strict=True
        ):
            before = prompt.segments[-1].width
            kept = plain_segment(segment, stage, pad, prompt.length)
            kept_vision = prefill.vision.gather(1, kept.index) & kept.valid
            scores = None if made.scores is None else made.scores[:, -before:].clone()
            prompt.segments.append(kept)
            prefill.stages.append(
                StageRecord(stage.layer, stage.keep, kept.index, kept_vision, scores, made.scorer)
            )
        prompt.segment_of_layer.update(output.segment_of_layer)
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        config = self._setup.backbone.text_model.config
        if cache is None and (getattr(config, "use_cache", True) if use_cache is None else use_cache):
            cache = DynamicCache(config=config)
        if cache is not None:
            for layer, cached in enumerate(output.cached):
                width = prompt.segments[prompt.segment_of_layer[layer]].width
                cache.update(cached.keys[:, :, -width:], cached.values[:, :, -width:], layer)
            prefill.attach_cache(cache)
        self._record.fast_prefills += 1
        hidden = output.hidden[:, -prompt.segments[-1].width :].clone()
        return output.kind(last_hidden_state=hidden, past_key_values=cache)
