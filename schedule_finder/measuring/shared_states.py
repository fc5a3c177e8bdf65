"""Hidden states that several schedules of a search have in common, computed once.

Two schedules that drop the same tokens before the decoder, or none, are the same up to the layer of the first other
stage. The second one starts there.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from pruning_runtime import Schedule
from pruning_runtime.backbone import Backbone
from pruning_runtime.forward_override import replaced_forwards
from schedule_finder.measuring.vision_features import output_bytes

MOST_BYTES = 2**32
"""States that are kept, at most. 32 unpruned prompts of LLaVA-1.5-7B take 2 GB before 12 layers in bfloat16."""
_BEFORE = 2
"""States are kept before the first stage's layer and the one before it: a search also tries a layer earlier."""

Key = tuple[str, str, int]


class SharedStates:
    """Keeps what entered a layer, and lets later schedules with the same tokens start at that layer.

    States of layers that share keys and values cannot be taken apart: on such a backbone every layer runs each time.

    Args:
        backbone: where schedules run.
        most_bytes: to stay within them, states of other tokens go, those first that were not used for longest. What
            still does not fit is not kept.
    """

    def __init__(self, backbone: Backbone, most_bytes: int = MOST_BYTES) -> None:
        self._layers = backbone.layers
        self._usable = backbone.kv_sources == tuple(range(backbone.shape.num_layers))
        self._most_bytes = most_bytes
        self._kept: OrderedDict[Key, Any] = OrderedDict()
        self._bytes = 0

    @contextmanager
    def reused(self, inputs: str, schedule: Schedule, later: Sequence[int] = ()) -> Iterator[range]:
        """Inside, one forward pass of these inputs under the schedule leaves out the layers that are yielded.

        Args:
            inputs: identity of the batch.
            schedule: applied to the model inside this ``with``.
            later: layers at which schedules with the same tokens are going to begin.
        """
        if not self._usable:
            yield range(0)
            return
        before = [stage for stage in schedule.stages if stage.layer < 0]
        inside = [stage.layer for stage in schedule.stages if stage.layer >= 0]
        tokens = _tokens(schedule, before)
        # A stage before the decoder may score with layer 0, so this layer runs.
        first = len(before)
        known = [layer for one, two, layer in self._kept if (one, two) == (inputs, tokens)]
        start = max((layer for layer in known if not inside or layer <= inside[0]), default=first)
        wanted = {*later, *(inside[0] - step for step in range(_BEFORE))} if inside else set()
        state = self._kept.get((inputs, tokens, start))
        if state is not None:
            self._kept.move_to_end((inputs, tokens, start))
        found: dict[int, Any] = {}
        new = {layer for layer in wanted if start < layer <= inside[0]}
        with _starting_at(self._layers, range(first, start), state), _remembering(self._layers, new, found):
            yield range(first, start)
        for layer, output in found.items():
            self._keep((inputs, tokens, layer), output)

    def _keep(self, key: Key, state: Any) -> None:
        size = output_bytes(state)
        while self._bytes + size > self._most_bytes:
            other = next((one for one in self._kept if one[1] != key[1]), None)
            if other is None:
                return
            self._bytes -= output_bytes(self._kept.pop(other))
        self._kept[key] = state
        self._bytes += size


def _tokens(schedule: Schedule, before: Sequence[Any]) -> str:
    """Identity of the tokens that enter the decoder."""
    if not before:
        return ""
    fields = {"scorer", "dropped_tokens", "positions", "image_newlines"}
    stages = [stage.model_dump(mode="json") for stage in before]
    return json.dumps([stages, schedule.model_dump(mode="json", include=fields)])


@contextmanager
def _starting_at(blocks: nn.ModuleList, skipped: range, state: Any) -> Iterator[None]:
    """Let the layers in ``skipped`` return ``state``, the output of the last of them, at once."""
    with replaced_forwards(
        blocks[skipped.start : skipped.stop], lambda _index, _own: lambda *_args, **_kwargs: state
    ):
        yield


@contextmanager
def _remembering(blocks: nn.ModuleList, layers: set[int], found: dict[int, Any]) -> Iterator[None]:
    """Put what enters each of ``layers`` into ``found``, before any hook changes it."""
    chosen = sorted(layers)

    def remembering(index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            found[chosen[index]] = own(*args, **kwargs)
            return found[chosen[index]]

        return forward

    with replaced_forwards([blocks[layer - 1] for layer in chosen], remembering):
        yield
