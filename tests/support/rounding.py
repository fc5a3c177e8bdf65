"""How far two float32 runs of the same model may differ: measured on the model, not guessed.

Kernels add in different orders on different processors and for different batch shapes. What that does to the
logits depends on the model: gated linear attention, for example, normalises small outputs and amplifies rounding
errors. So the bound of a comparison is measured on the model and the inputs of the test itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.support.own_mask_reference import find_layers
from tests.support.tiny_models import Inputs

RELATIVE = 1e-5
"""The contract: float32 logits agree within this share of their scale."""
FACTOR = 8.0
"""Room above the measured effect of one rounding error per layer: a layer makes many of them."""
DRAWS = 3


def rounding_bound(model: PreTrainedModel, inputs: Inputs) -> float:
    """Largest difference of two runs' logits that float32 rounding explains.

    The larger of `RELATIVE` times the logits' scale and `FACTOR` times `rounding_effect`.
    """
    scale, effect = rounding_effect(model, inputs)
    bound = max(RELATIVE * scale, FACTOR * effect)
    # Dropping one token changes logits by more than 0.05: a bound near that would hide a wrong implementation.
    assert bound < 2e-3, f"rounding changes the logits by {effect:.1e}; this test can show nothing"
    return bound


def rounding_effect(model: PreTrainedModel, inputs: Inputs) -> tuple[float, float]:
    """Scale of the prompt's logits, and how far they move if every layer's input is off by one last place.

    Both are maxima over valid positions, the second over `DRAWS` seeded draws of signs.
    """
    valid = inputs["attention_mask"].bool()
    return effect_on(lambda: _logits(model, inputs)[valid], find_layers(model))


def effect_on(measure: Callable[[], Tensor], layers: Iterable[nn.Module]) -> tuple[float, float]:
    """As `rounding_effect`, of any measurement and any layers whose first input are hidden states."""
    exact, layers = measure(), list(layers)
    moved = []
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)

        def nudge(hidden: Tensor, generator: torch.Generator = generator) -> Tensor:
            signs = torch.randint(0, 2, hidden.shape, generator=generator) * 2 - 1
            return hidden * (1 + signs.to(hidden.device) * torch.finfo(torch.float32).eps)

        def hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], nudge: Any = nudge
        ) -> Any:
            if args:
                return (nudge(args[0]), *args[1:]), kwargs
            name = next(iter(kwargs))  # hidden states come first, under a name of the family's
            return args, {**kwargs, name: nudge(kwargs[name])}

        hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        try:
            moved.append(float((measure() - exact).abs().max()))
        finally:
            for one in hooks:
                one.remove()
    return float(exact.abs().max()), max(moved)


def _logits(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits
