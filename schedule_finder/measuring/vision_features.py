"""Vision features of prompts that run many times, computed once.

A search runs the same prompts under some hundred schedules, an evaluation under some dozen. The vision tower and the
projector give the same features each time: only the decoder differs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from pruning_runtime.backbone import Backbone

_METHODS = ("get_image_features", "get_video_features")
"""How transformers' models get the features of images and videos, without the decoder."""
MOST_BYTES = 2**31
"""Features that are kept, at most. 192 prompts of LLaVA-1.5-7B take 0.9 GB in bfloat16."""
_LARGE_FIELDS = ("hidden_states", "attentions")
"""Fields of the features' output that no decoder reads: states of every block of the tower."""

Call = tuple[Any, ...]


class VisionFeatures:
    """Keeps what the vision part of a model returned, and returns it again for the same input tensors.

    Inputs are the same if they are the same memory, which is kept alive; change none of them in place. Models that do
    not ask for features by ``get_image_features`` (Phi-4 multimodal) compute them each time.

    Args:
        backbone: whose features are kept.
        most_bytes: later features are computed each time once so many bytes are kept.
    """

    def __init__(self, backbone: Backbone, most_bytes: int = MOST_BYTES) -> None:
        self._model = backbone.model
        self._room = most_bytes
        self._kept: dict[Call, tuple[Any, list[Tensor]]] = {}

    @contextmanager
    def reused(self, allowed: bool = True) -> Iterator[None]:
        """Inside, the model takes features from here. Not ``allowed``: the vision tower runs, as a tower rule needs."""
        owner = _owner(self._model) if allowed else None
        names = [] if owner is None else [name for name in _METHODS if hasattr(owner, name)]
        try:
            for name in names:
                vars(owner)[name] = self._remembering(name, getattr(owner, name))
            yield
        finally:
            for name in names:
                vars(owner).pop(name, None)

    def forget(self) -> None:
        """Free what is kept."""
        self._room += sum(output_bytes(output) for output, _ in self._kept.values())
        self._kept.clear()

    def _remembering(self, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)  # `generate` reads its signature
        def features(*args: Any, **kwargs: Any) -> Any:
            call = _call(name, args, kwargs)
            if call is None:
                return own(*args, **kwargs)
            if call in self._kept:
                return self._kept[call][0]
            output = own(*args, **kwargs)
            size = output_bytes(_without_states(output))
            if size <= self._room:
                self._room -= size
                given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
                self._kept[call] = _without_states(output), given
            return output

        return features


def _owner(model: PreTrainedModel) -> Any:
    """The module whose forward asks for features: the model without its head, or the model itself."""
    inner = getattr(model, "model", None)
    found = inner if hasattr(inner, _METHODS[0]) else model
    # An instance attribute is somebody else's.
    return found if hasattr(found, _METHODS[0]) and _METHODS[0] not in vars(found) else None


def _call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """Identity of a call: tensors by their memory, all else by value; None where an argument is neither."""
    call: list[Any] = [name]
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    for key, value in (*enumerate(args), *sorted(kwargs.items())):
        if isinstance(value, Tensor):
            call += [key, value.data_ptr(), value.shape, value.stride(), value.dtype]
        elif value is None or isinstance(value, bool | int | float | str):
            call += [key, type(value), value]
        elif isinstance(value, list | tuple) and all(isinstance(one, int) for one in value):
            call += [key, type(value), *value]
        else:
            return None  # an object, such as a cache: what it holds may change between calls
    return tuple(call)


def _without_states(output: Any) -> Any:
    """The output without the fields that only analyses read."""
    if not isinstance(output, dict):
        return output
    found = type(output)(**{key: value for key, value in output.items() if key not in _LARGE_FIELDS})
    # In transformers 5.17, some models set features as an attribute that is no field of their output.
    for name, value in _attributes(output).items():
        if name not in found and name not in _LARGE_FIELDS:
            setattr(found, name, value)
    return found


def _attributes(output: Any) -> dict[str, Any]:
    """All attributes of an output, fields included; none of a plain dictionary."""
    return getattr(output, "__dict__", {})


def output_bytes(output: Any) -> int:
    """Bytes of all tensors in an output."""
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    if isinstance(output, dict):
        return sum(map(output_bytes, {**_attributes(output), **output}.values()))
    if isinstance(output, (list, tuple)):
        return sum(map(output_bytes, output))
    return 0
