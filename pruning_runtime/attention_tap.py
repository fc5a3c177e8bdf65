"""Pass q and k of every decoder layer to a callback, and run the model's own attention kernel.

The tap is an attention function that is registered under a unique name for the duration of a ``with``. It calls the
callback and then the kernel that the user chose. It is set on the decoder only; a vision tower keeps its kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pruning_runtime.backbone import Backbone
from pruning_runtime.errors import UnsupportedBackbone

_serial = count()


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Inputs of one decoder layer's attention kernel.

    ``query`` is ``[batch, heads, queries, head_dim]``, ``key`` ``[batch, kv_heads, keys, head_dim]``,
    both after RoPE and un-repeated; ``mask`` is in the kernel's own convention (None means causal).
    """

    layer: int
    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None
    sliding_window: int | None


AttentionCallback = Callable[[AttentionInputs], None]


@contextmanager
def attention_tap(backbone: Backbone, callback: AttentionCallback) -> Iterator[None]:
    """Call ``callback`` with the inputs of every decoder attention, before its kernel runs.

    Raises `UnsupportedBackbone` where the decoder's kernel cannot be tapped (flex attention).
    """
    text = backbone.text_model
    chosen = text.config._attn_implementation
    if chosen != "eager" and chosen not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise UnsupportedBackbone(f"attention kernel {chosen!r} has no mask function; choose sdpa or eager")
    if chosen.startswith("flex"):
        raise UnsupportedBackbone("flex attention's block masks cannot be pruned; choose sdpa or eager")

    layer_of = {module: layer for layer, block in enumerate(backbone.layers) for module in block.modules()}

    def tapped(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        layer = layer_of.get(module)
        if layer is not None:
            scaling = kwargs.get("scaling")
            callback(
                AttentionInputs(
                    layer=layer,
                    query=query,
                    key=key,
                    mask=mask,
                    scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
                    softcap=kwargs.get("softcap"),
                    sliding_window=kwargs.get("sliding_window"),
                )
            )
        return attention_kernel(chosen, module)(module, query, key, value, mask, *args, **kwargs)

    # The name must not contain the name of a kernel: transformers matches them as substrings.
    name = f"adaptinfer_tap_{next(_serial)}"
    ALL_ATTENTION_FUNCTIONS[name] = tapped
    # Masks must be registered on the class: without an entry there, transformers silently makes no mask.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[chosen])
    try:
        # "" is the decoder alone: submodules may include the vision tower, which keeps its kernel.
        text.set_attn_implementation({"": name})
        yield
    finally:
        text.set_attn_implementation({"": chosen})
        del ALL_ATTENTION_FUNCTIONS[name]
        # There is no public function to remove a registration.
        del AttentionMaskInterface._global_mapping[name]


def attention_kernel(name: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function ``name`` of an attention module."""
    kind: Any = type(module)  # mypy takes the class's `__hash__` for that of its instances
    return _eager_of(kind) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]


@cache
def _eager_of(kind: Any) -> Callable[..., Any]:
    """The eager attention function that a class's forward falls back to; some files have several."""
    forward = inspect.unwrap(kind.forward)
    names = [name for name in forward.__code__.co_names if name.endswith("eager_attention_forward")]
    return forward.__globals__[names[0] if names else "eager_attention_forward"]
