"""The decoder's prefill at static shapes, captured once for each shape as a CUDA graph and replayed.

In a small batch, launching a pruned layer's kernels one by one takes longer than running them. Here a prompt is
padded on the left to a bucket of lengths, every stage to a bucket of widths, and the decoder, its stages included,
runs as one graph over buffers that are filled anew each time. What comes out is cut back to the widths of the plain
path, so that caches, records and the tokens generated later are the same as there.
"""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils.generic import ModelOutput

from pruning_runtime.backbone import Backbone
from pruning_runtime.masks import AttentionSpan, kernel_mask
from pruning_runtime.model_quirks.attention_temperature import find_temperature
from pruning_runtime.prefill import Prefill
from pruning_runtime.record import Record, StageRecord
from pruning_runtime.renumbering import rope_types
from pruning_runtime.scorers import Scorer
from pruning_runtime.selection import StagePlan
from pruning_runtime.sequence import PrunedPrompt, Segment

MOST_GRAPHS, MOST_BYTES = 16, 4 * 2**30
"""Graphs kept at once, and what they may hold together; the one that was not used for longest makes room."""
_WARM_UPS = 2
"""Runs before a capture, in which libraries choose and set up their kernels."""

_SERVED = frozenset({"inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache"})
_PLAIN_TYPES = (bool, int, type(None))


class _NotStatic(Exception):
    """Why a call cannot run at static shapes."""


def bucket(count: int) -> int:
    """The static length for ``count`` positions: at least as many, at most a sixteenth or seven more.

    A multiple of 8 below 256, of 16 below 512, and so on: sixteen lengths from each power of two to the next.
    """
    step = max(8, 1 << max(count.bit_length() - 5, 0))
    return -(-count // step) * step


class FastPrefill:
    """Runs prompts through the decoder at static shapes; what it cannot serve, the plain path does.

    Args:
        backbone: on one device.
        scorer: of the schedule.
        record: counts the prompts that took this path, and the shapes that were captured.
        decoder: the text model's forward.
        run: ``run(prefill, arguments)`` calls ``decoder`` while the hooks of the layers work on ``prefill``.
    """

    def __init__(
        self,
        backbone: Backbone,
        scorer: Scorer,
        record: Record,
        decoder: Callable[..., Any],
        run: Callable[[Prefill, dict[str, Any]], Any],
    ) -> None:
        self._backbone = backbone
        self._record = record
        self._decoder = decoder
        self._run = run
        self._kernel: str = backbone.text_model.config._attn_implementation
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._device = next(backbone.text_model.parameters()).device
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self._reason = why_not_fast(backbone, scorer)
        self._warned: set[str] = set()
        if self._reason is None and self._pool is None:
            self._warn(
                f"fast=True: there are no CUDA graphs on {self._device.type}, so the static shapes are run "
                "uncaptured; that is right, but no faster"
            )

    def __call__(self, forward: Prefill, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The decoder's output for a prompt whose prefill is ``forward``."""
        try:
            if self._reason is not None:
                raise _NotStatic(self._reason)
            graph, pad = self._prepared(forward, args, kwargs)
        except _NotStatic as reason:
            self._warn(f"fast=True: {reason}; the plain path runs instead")
            return self._decoder(*args, **kwargs)
        # In a mode of its own: what inference mode makes could not be written to outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            output = graph.replay()
            return self._finish(forward, graph, output, kwargs, pad)

    def close(self) -> None:
        """Give all graphs and their memory back."""
        if self._graphs and self._pool is not None:
            torch.cuda.synchronize(self._device)  # the last of them may still be running
        self._graphs.clear()

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)

    # ---- in: pad, capture, fill

    def _prepared(
        self, forward: Prefill, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[_Graph, int]:
        """The graph for a call, its buffers filled, and how many positions of padding it has."""
        self._check(args, kwargs)
        embeds: Tensor = kwargs["inputs_embeds"]
        length = embeds.shape[1]
        width = bucket(length)
        plan = {
            layer: replace(stage, width=bucket(stage.width), filled=True)
            for layer, stage in forward.plan.items()
        }
        num_text_queries = bucket(forward.num_text_queries)
        given = self._everything(forward, kwargs)
        flags = {
            name: value
            for name, value in kwargs.items()
            if name not in _SERVED and isinstance(value, _PLAIN_TYPES)
        }
        key = (
            tuple((name, part.signature()) for name, part in given.items()),
            width,
            num_text_queries,
            tuple((layer, stage.width) for layer, stage in plan.items()),
            tuple(flags.items()),
        )
        graph = self._graphs.get(key)
        with torch.inference_mode(False), torch.no_grad():
            buffers = {n: part.buffer(width) for n, part in given.items()} if graph is None else graph.buffers
            for name, part in given.items():
                part.write(buffers[name])
            if graph is None:
                graph = _Graph(buffers, plan, num_text_queries, flags, self._run)
                self._capture(graph)
                self._graphs[key] = graph
                # A capture begins by waiting for the device, so what goes is not running any more.
                while len(self._graphs) > 1 and (
                    len(self._graphs) > MOST_GRAPHS
                    or sum(graph.held_bytes for graph in self._graphs.values()) > MOST_BYTES
                ):
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
        return graph, width - length

    def _everything(self, forward: Prefill, kwargs: dict[str, Any]) -> dict[_Name, _Padded]:
        """All tensors that a call of the decoder depends on, by name."""
        embeds: Tensor = kwargs["inputs_embeds"]
        batch, length, _ = embeds.shape
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=embeds.device).expand(batch, -1)
        mask = kwargs.get("attention_mask")
        found: dict[_Name, _Padded] = {
            ("embeds", None): _Padded(embeds, (1,), 0.0),
            ("positions", None): _Padded(positions, (positions.dim() - 1,), 0),
            ("valid", None): _Padded(forward.prompt.segments[0].valid, (1,), False),
            ("vision", None): _Padded(forward.vision, (1,), False),
            ("text_queries", None): _Padded(forward.text_queries, (1,), False),
        }
        if forward.image_newlines is not None:
            found["image_newlines", None] = _Padded(forward.image_newlines, (1,), False)
        for layer, features in forward.deepstack.items():
            found["deepstack", layer] = _Padded(features, (1,), 0.0)
        for name, value in kwargs.items():
            if name not in _SERVED and isinstance(value, Tensor):
                found["argument", name] = _Padded(value, (1,), 0)
        for kind, whole in mask.items() if isinstance(mask, dict) else [(None, mask)]:
            if whole is None and kind is not None:
                whole = self._whole_mask(kind, forward, embeds)
            if whole is not None and whole.dim() == 4:
                unseen = False if whole.dtype == torch.bool else torch.finfo(whole.dtype).min
                found["mask", kind] = _Padded(whole, (2, 3), unseen)
        for layer, keep in forward.keep.items():
            found["keep", layer] = _Padded(keep, (), 0)
        return found

    def _whole_mask(self, kind: str, forward: Prefill, embeds: Tensor) -> Tensor:
        """The mask that a model left out, because its kernel is causal by itself; padding needs it."""
        whole = forward.prompt.segments[0]
        attention_span = AttentionSpan.of_kind(kind, self._backbone.text_model.config)
        allowed = attention_span.allows(whole.index, whole.index, forward.prompt.first(embeds.device))
        return kernel_mask(allowed & whole.valid[:, None, :], whole.valid, self._kernel, embeds.dtype)

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise `_NotStatic` for what this path was not made for."""
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        if args or embeds is None:
            raise _NotStatic("the decoder is not given `inputs_embeds` by name")
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            raise _NotStatic("gradients are enabled; call the model inside torch.inference_mode()")
        if torch.is_autocast_enabled(self._device.type):
            # Weights that it has cast are freed when it ends; a graph would go on reading them.
            raise _NotStatic("autocast is on; load the model in the precision that it is to run in")
        if cache is not None and (type(cache) is not DynamicCache or cache.offloading):
            raise _NotStatic(f"{type(cache).__name__} is not a plain DynamicCache")
        for name, value in kwargs.items():
            padded = isinstance(value, Tensor) and value.shape[:2] == embeds.shape[:2]
            if not (name in _SERVED or padded or isinstance(value, _PLAIN_TYPES)):
                raise _NotStatic(f"the decoder's argument `{name}` cannot be padded")
            if name.startswith("output_") and value:
                raise _NotStatic(f"`{name}` asks for more than the last hidden states")

    def _capture(self, graph: _Graph) -> None:
        """Capture where there is something to capture on; after a failure this path is given up."""
        if self._pool is not None:
            try:
                with torch.cuda.device(self._device):
                    graph.capture(self._pool)
            except RuntimeError as error:
                self._graphs.clear()
                # Ending a capture that failed fails again, and says less.
                first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
                self._reason = f"this decoder could not be captured ({str(first).splitlines()[0]})"
                raise _NotStatic(self._reason) from error
        self._record.captures += 1

    # ---- out: cut back to the plain path's widths

    def _finish(
        self, forward: Prefill, graph: _Graph, output: _Output, kwargs: dict[str, Any], pad: int
    ) -> ModelOutput:
        prompt = forward.prompt
        for stage, segment, made in zip(
            forward.plan.values(), output.segments[1:], output.stages, strict=True
        ):
            before = prompt.segments[-1].width
            kept = _plain_segment(segment, stage, pad, prompt.length)
            kept_vision = forward.vision.gather(1, kept.index) & kept.valid
            scores = None if made.scores is None else made.scores[:, -before:].clone()
            prompt.segments.append(kept)
            forward.stages.append(StageRecord(stage.layer, stage.keep, kept.index, kept_vision, scores))
        prompt.segment_of_layer.update(output.segment_of_layer)
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        config = self._backbone.text_model.config
        if cache is None and (getattr(config, "use_cache", True) if use_cache is None else use_cache):
            cache = DynamicCache(config=config)
        if cache is not None:
            for layer, cached in enumerate(output.cached):
                width = prompt.segments[prompt.segment_of_layer[layer]].width
                cache.update(cached.keys[:, :, -width:], cached.values[:, :, -width:], layer)
            forward.fill(cache)
        self._record.fast_prefills += 1
        hidden = output.hidden[:, -prompt.segments[-1].width :].clone()
        return output.kind(last_hidden_state=hidden, past_key_values=cache)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device, as each stream that multiplied matrices keeps a workspace for good."""
    return torch.cuda.Stream(device)


@contextmanager
def _mended_after_failure(device: torch.device) -> Iterator[None]:
    """Undo what a capture that fails leaves: its stream is current, and the generator waits for its end."""
    try:
        with torch.cuda.stream(torch.cuda.current_stream(device)):
            yield
    except BaseException:
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())
        raise


def why_not_fast(backbone: Backbone, scorer: Scorer) -> str | None:
    """Why a backbone cannot run its prefill at static shapes; None where it may."""
    text = backbone.text_model
    kernel = text.config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        return f"attention kernel {kernel!r} may read the padding on the host; sdpa and eager do not"
    if not all(map(backbone.attends, range(len(backbone.layers)))):
        return "its recurrent layers keep a state that is not cut back"
    if backbone.kv_sources != tuple(range(len(backbone.layers))):
        return "its layers share keys"
    if grows := rope_types(text) & {"dynamic", "longrope"}:
        return f"its {grows.pop()!r} RoPE reads the longest position on the host"
    if any(find_temperature(block) is not None for block in backbone.layers):
        return "its queries are scaled by their place, which padding moves"
    moved = any(hasattr(module, "_hf_hook") for module in text.modules())
    if moved or len({parameter.device for parameter in text.parameters()}) > 1:
        return "its decoder is spread over several devices or offloaded"
    if text.config.output_hidden_states or text.config.output_attentions:
        return "its configuration asks for more than the last hidden states"
    if scorer.name == "random":
        return "scorer 'random' draws on the host"
    return None


def _plain_segment(segment: Segment, stage: StagePlan, pad: int, length: int) -> Segment:
    """A static segment cut to its stage's width, in positions of the prompt without ``pad``."""
    index, valid = segment.index[:, -stage.width :], segment.valid[:, -stage.width :].clone()
    weights = None if segment.weights is None else segment.weights[:, -stage.width :].clone()
    if not stage.filled:
        return Segment(index - pad, valid, False, weights)
    # Fillers may stand for padding that the prompt does not have: any of its positions that left will do instead.
    kept = torch.zeros(len(index), pad + length, dtype=torch.bool, device=index.device)
    kept = kept.scatter_(1, segment.index, segment.valid)[:, pad:]
    position = torch.arange(length, device=index.device)
    index = (kept * length + position).argsort(dim=1)[:, -stage.width :]
    return Segment(index, valid, True, weights)


@dataclass(frozen=True)
class _Padded:
    """A tensor whose dimensions ``along`` run over the prompt, and what padding in front of it is filled with."""

    tensor: Tensor
    along: tuple[int, ...]
    fill: bool | float

    def signature(self) -> Hashable:
        """All that two calls must have in common to share a buffer: everything but the prompt's length."""
        sizes = tuple(size for dim, size in enumerate(self.tensor.shape) if dim not in self.along)
        return self.tensor.dtype, self.along, sizes

    def buffer(self, width: int) -> Tensor:
        """A fresh buffer for prompts of at most ``width`` positions."""
        shape = [width if dim in self.along else size for dim, size in enumerate(self.tensor.shape)]
        return torch.full(shape, self.fill, dtype=self.tensor.dtype, device=self.tensor.device)

    def write(self, buffer: Tensor) -> None:
        """Put the tensor at the end of ``buffer``."""
        inner = buffer
        for dim in self.along:
            pad = buffer.shape[dim] - self.tensor.shape[dim]
            buffer.narrow(dim, 0, pad).fill_(self.fill)
            inner = inner.narrow(dim, pad, self.tensor.shape[dim])
        inner.copy_(self.tensor)


_Name = tuple[str, Any]
"""What a buffer holds: ``mask`` by layer kind, ``deepstack`` by layer, ``keep`` by stage; others have one entry."""


@dataclass(frozen=True)
class _Output:
    """What a static run leaves, in memory that the next run writes over; ``kind`` is the decoder's own."""

    kind: Callable[..., ModelOutput]
    hidden: Tensor
    cached: list[Any]
    segments: list[Segment]
    segment_of_layer: dict[int, int]
    stages: list[StageRecord]


class _HeldLayer(DynamicLayer):
    """Holds a prompt's keys and values as they are.

    The caller's own cache would throw away what is still to be cut, where a layer has a window; and growing by
    concatenation begins with an empty tensor made on the host, for which a capture cannot wait.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        return key_states, value_states


class _Graph:
    """The decoder over one set of buffers."""

    def __init__(
        self,
        buffers: dict[_Name, Tensor],
        plan: dict[int, StagePlan],
        num_text_queries: int,
        flags: dict[str, Any],
        run: Callable[[Prefill, dict[str, Any]], Any],
    ) -> None:
        self.buffers = buffers
        self._plan, self._num_raters = plan, num_text_queries
        self._flags = flags
        self._decoder = run
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: _Output | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes that stay taken between runs: buffers, keys and values; scratch memory is shared by all graphs."""
        cached = self._output.cached if self._output is not None else []
        states = [state for layer in cached for state in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in (*self.buffers.values(), *states))

    def capture(self, pool: Any) -> None:
        """Record the kernels of one run; raises RuntimeError where one waits for the host."""
        device = self.buffers["valid", None].device
        graph = torch.cuda.CUDAGraph()
        with _mended_after_failure(device):
            self.warm_up()
            # torch's own stream for captures is on the device of the process's first one.
            with torch.cuda.graph(graph, pool, _capture_stream(device), capture_error_mode="thread_local"):
                self._output = self._run()
        self._graph = graph

    def warm_up(self) -> None:
        """Run the kernels that a capture records, so that libraries choose and set them up before."""
        # Where nothing is padded transformers leaves out the mask, and another kernel runs; but a capture cannot
        # look, and always has one.
        first = self.buffers["valid", None][:, 0]
        before = first.clone()
        first.fill_(False)
        for _ in range(_WARM_UPS):
            self._run()
        first.copy_(before)

    def replay(self) -> _Output:
        """Run on what the buffers hold now."""
        if self._graph is None:
            return self._run()
        self._graph.replay()
        assert self._output is not None
        return self._output

    def _run(self) -> _Output:
        valid = self.buffers["valid", None]
        batch, width = valid.shape
        position = torch.arange(width, device=valid.device).expand(batch, width)
        prefill = Prefill(
            prompt=PrunedPrompt(width, [Segment(position, valid, filled=True)]),
            number=0,
            vision=self.buffers["vision", None],
            text_queries=self.buffers["text_queries", None],
            num_text_queries=self._num_raters,
            plan=self._plan,
            keep=self._all("keep"),
            image_newlines=self.buffers.get(("image_newlines", None)),
            deepstack=self._all("deepstack"),
        )
        masks = self._all("mask")
        cache = Cache(layer_class_to_replicate=_HeldLayer)
        arguments = {
            **self._flags,
            **self._all("argument"),
            "inputs_embeds": self.buffers["embeds", None],
            "position_ids": self.buffers["positions", None],
            "attention_mask": masks.get(None, masks) if masks else valid.long(),
            "past_key_values": cache,
            "use_cache": True,
        }
        output = self._decoder(prefill, arguments)
        return _Output(
            kind=type(output),
            hidden=output[0],
            cached=cache.layers,
            segments=prefill.prompt.segments,
            segment_of_layer=prefill.prompt.segment_of_layer,
            stages=prefill.stages,
        )

    def _all(self, what: str) -> dict[Any, Tensor]:
        return {key: tensor for (name, key), tensor in self.buffers.items() if name == what}
