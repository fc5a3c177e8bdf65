"""One captured prefill: the decoder, its stages included, as a CUDA graph on static buffers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.utils.generic import ModelOutput

from pruning_runtime.prefill import Prefill
from pruning_runtime.record import StageRecord
from pruning_runtime.scoring import PromptCounts, StageScoring
from pruning_runtime.selection import StagePlan
from pruning_runtime.sequence import PrunedPrompt, Segment
from pruning_runtime.setup import PruningSetup

WARM_UPS = 2
"""Runs before a capture, in which libraries choose and initialize their kernels."""

BufferName = tuple[str, Any]
"""Name and key of a buffer: ``mask`` by layer kind, ``deepstack`` by layer, ``keep`` by stage; others have key None."""


@dataclass(frozen=True)
class StaticOutput:
    """Result of a static run, in memory that the next run overwrites; ``kind`` is the decoder's output class."""

    kind: Callable[..., ModelOutput]
    hidden: Tensor
    cached: list[Any]
    segments: list[Segment]
    segment_of_layer: dict[int, int]
    stages: list[StageRecord]


class _HeldLayer(DynamicLayer):
    """Holds a prompt's keys and values without a copy.

    A sliding layer of the caller's cache would drop keys before they are cut to the prompt, and a dynamic layer
    concatenates to an empty tensor that is made on the host, which a capture does not allow.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        return key_states, value_states


class Graph:
    """The decoder on one set of buffers.

    Args:
        setup: of the ``with``.
        buffers: inputs of a run.
        plan: stages at static widths.
        counts: of the prompt, at static sizes.
        flags: keyword arguments of the decoder that are not tensors.
        run: ``run(prefill, arguments)`` calls the decoder with the hooks working on ``prefill``.
    """

    def __init__(
        self,
        setup: PruningSetup,
        buffers: dict[BufferName, Tensor],
        plan: dict[int, StagePlan],
        counts: PromptCounts,
        flags: dict[str, Any],
        run: Callable[[Prefill, dict[str, Any]], Any],
    ) -> None:
        self._setup, self.buffers = setup, buffers
        self._plan, self._counts = plan, counts
        self._flags = flags
        self._call_decoder = run
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: StaticOutput | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes held between runs: buffers, keys and values. All graphs share their scratch memory."""
        cached = self._output.cached if self._output is not None else []
        states = [state for layer in cached for state in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in (*self.buffers.values(), *states))

    def capture(self, pool: Any) -> None:
        """Capture the kernels of one run. Raises RuntimeError if one of them waits for the host."""
        device = self.buffers["valid", None].device
        graph = torch.cuda.CUDAGraph()
        with _restored_after_failure(device):
            self.warm_up()
            # torch's default capture stream is on the device of the first capture of the process.
            with torch.cuda.graph(graph, pool, _capture_stream(device), capture_error_mode="thread_local"):
                self._output = self._run()
        self._graph = graph

    def warm_up(self) -> None:
        """Run the kernels of a capture before it, so that libraries choose and initialize them."""
        # Without padding, transformers omits the mask and another kernel runs. A capture cannot read the mask, so it
        # always has one; a padded first position makes the warm-up run the same kernels.
        first = self.buffers["valid", None][:, 0]
        before = first.clone()
        first.fill_(False)
        for _ in range(WARM_UPS):
            self._run()
        first.copy_(before)

    def replay(self) -> StaticOutput:
        """Run on the current contents of the buffers."""
        if self._graph is None:
            return self._run()
        self._graph.replay()
        assert self._output is not None
        return self._output

    def _run(self) -> StaticOutput:
        """One prefill on the buffers."""
        valid = self.buffers["valid", None]
        batch, width = valid.shape
        position = torch.arange(width, device=valid.device).expand(batch, width)
        prompt = PrunedPrompt(width, [Segment(position, valid, padded=True)])
        vision, text_queries = self.buffers["vision", None], self.buffers["text_queries", None]
        prefill = Prefill(
            setup=self._setup,
            prompt=prompt,
            scoring=StageScoring(self._setup, prompt, 0, vision, text_queries, self._counts),
            vision=vision,
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
        output = self._call_decoder(prefill, arguments)
        return StaticOutput(
            kind=type(output),
            hidden=output[0],
            cached=cache.layers,
            segments=prefill.prompt.segments,
            segment_of_layer=prefill.prompt.segment_of_layer,
            stages=prefill.stages,
        )

    def _all(self, what: str) -> dict[Any, Tensor]:
        """The buffers called ``what``, by their key."""
        return {key: tensor for (name, key), tensor in self.buffers.items() if name == what}


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures on a device: every stream that multiplies matrices keeps a workspace."""
    return torch.cuda.Stream(device)


@contextmanager
def _restored_after_failure(device: torch.device) -> Iterator[None]:
    """Restore the current stream and the random generator, which a failed capture leaves in capture mode."""
    try:
        with torch.cuda.stream(torch.cuda.current_stream(device)):
            yield
    except BaseException:
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())
        raise
