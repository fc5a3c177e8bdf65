"""Divides the time of a run into parts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from pruning_runtime import Record
from pruning_runtime.backbone import Backbone
from schedule_finder.errors import InputError

PREFILL_PARTS = ("vision_tower", "projector", "decoder", "scoring", "dropping", "lm_head", "other")
DECODE_PARTS = ("decoder", "lm_head", "other")
PRUNING_PARTS = ("scoring", "dropping")
"""Work of the stages; it happens inside the decoder."""


class PartClock:
    """Divides a run into parts: the time from `start` to the last forward belongs to exactly one part at a time.

    Parts nest; the time of an inner part does not count for the outer one. Time stamps are taken while running and read
    afterwards, so that measuring does not wait for the device.

    Args:
        now: takes a time stamp.
        between: milliseconds from one time stamp to a later one.
    """

    def __init__(self, now: Callable[[], Any], between: Callable[[Any, Any], float]) -> None:
        self._now, self._between = now, between
        self._moments: list[tuple[Any, tuple[str, str]]] = []
        self._open: list[str] = []
        self._forwards: list[int] = []
        self._phase = ""
        self.running = False

    @classmethod
    def on(cls, device: torch.device) -> PartClock:
        """A clock for a device: events on CUDA, `time.perf_counter` elsewhere."""
        if device.type != "cuda":
            return cls(time.perf_counter, lambda begun, ended: 1e3 * (ended - begun))

        def event() -> Any:
            made = torch.cuda.Event(enable_timing=True)
            made.record(torch.cuda.current_stream(device))
            return made

        return cls(event, lambda begun, ended: begun.elapsed_time(ended))

    def start(self) -> None:
        """Start with the prefill, in the part ``other``."""
        self._moments, self._forwards = [], []
        self._open, self._phase, self.running = ["other"], "prefill", True
        self._mark()

    def enter(self, part: str) -> None:
        """Open a part; does nothing while the clock is stopped."""
        if self.running:
            self._open.append(part)
            self._mark()

    def leave(self) -> None:
        """Close the part opened last."""
        if self.running:
            self._open.pop()
            self._mark()

    def end_forward(self, last: bool) -> None:
        """The end of a forward: what follows is decoding; after the last one the clock stops."""
        if self.running:
            self._phase = "decode"
            self._mark()
            self._forwards.append(len(self._moments) - 1)
            self.running = not last

    def read(self) -> tuple[dict[str, dict[str, float]], list[float]]:
        """Milliseconds by phase (``prefill``, ``decode``) and part, and from the start to each token."""
        parts: dict[str, dict[str, float]] = {"prefill": defaultdict(float), "decode": defaultdict(float)}
        elapsed, since_start = [0.0], 0.0
        for (begun, (phase, part)), (ended, _) in zip(self._moments, self._moments[1:], strict=False):
            passed = self._between(begun, ended)
            parts[phase][part] += passed
            since_start += passed
            elapsed.append(since_start)
        return {phase: dict(found) for phase, found in parts.items()}, [elapsed[at] for at in self._forwards]

    def _mark(self) -> None:
        self._moments.append((self._now(), (self._phase, self._open[-1])))


def _parts_of(backbone: Backbone) -> dict[str, list[nn.Module]]:
    """Modules by part. Raises `InputError` if the vision tower is not where stock families have it."""
    model: Any = backbone.model
    inner = model.model
    tower = getattr(inner, "vision_tower", None) or getattr(inner, "visual", None)
    if tower is None:
        raise InputError(f"{type(model).__name__}: no `vision_tower` or `visual` to time")
    names = ("multi_modal_projector", "merger", "deepstack_merger_list")
    projectors = [getattr(owner, name) for owner in (inner, tower) for name in names if hasattr(owner, name)]
    called = [
        module for found in projectors for module in (found if isinstance(found, nn.ModuleList) else [found])
    ]
    return {
        "vision_tower": [tower],
        "projector": called,
        "decoder": [backbone.text_model],
        "lm_head": [model.get_output_embeddings()],
    }


@contextmanager
def timed_by_parts(backbone: Backbone, clock: PartClock, length: int, caches: list[int]) -> Iterator[None]:
    """Drive the clock by hooks for ``length`` forwards; appends the bytes of the prompt's cache to ``caches``."""
    count = 0

    def end_forward(_module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal count
        if not clock.running:
            return
        count += 1
        clock.end_forward(last=count == length)
        if count == 1:
            caches.append(Record(0, cache=output.past_key_values).cache_bytes)

    with ExitStack() as undo:
        for part, modules in _parts_of(backbone).items():
            for module in modules:
                enter = module.register_forward_pre_hook(lambda *_, part=part: clock.enter(part))
                undo.callback(enter.remove)
                undo.callback(module.register_forward_hook(lambda *_: clock.leave()).remove)
        undo.callback(backbone.model.register_forward_hook(end_forward).remove)
        yield
