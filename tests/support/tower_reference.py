"""Slow references for the vision tower, without the product's code: owners of patches by one backward pass per vision
token, and attention maps as the model's own eager kernel computes them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning_runtime.backbone import find_backbone
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import FAMILIES, Inputs


@dataclass(frozen=True)
class TowerCase:
    """A small model and a ragged batch for it."""

    build: Callable[..., PreTrainedModel]
    batch: Callable[[], Inputs]
    kernels: tuple[str, ...] = ("sdpa", "eager")


def tower_cases() -> dict[str, TowerCase]:
    """Every small family that this release of transformers has, with images and, where it takes them, videos."""
    cases = {}
    for name, family in FAMILIES.items():
        cases[name] = TowerCase(family.build, lambda f=family: f.batch((2, 1, 0), seed=1))
        if family.videos:
            cases[f"{name} video"] = TowerCase(
                family.build, lambda f=family: f.batch((0, 0), videos_per_row=(2, 1), seed=1)
            )
            cases[f"{name} both"] = TowerCase(
                family.build, lambda f=family: f.batch((1, 2), videos_per_row=(1, 1), seed=1)
            )
    for name, family in FAMILIES_A.items():
        if family.available:
            cases[name] = TowerCase(family.build, lambda f=family: f.batch((2, 1), seed=1))
            if family.video:
                cases[f"{name} video"] = TowerCase(
                    family.build, lambda f=family: f.batch((2, 1), modality="video", seed=1)
                )
    for name, family in FAMILIES_B.items():
        if family.missing is None:
            cases[name] = TowerCase(family.build, lambda f=family: f.batch(seed=1), family.kernels)
    return cases


REFUSED = {"granite4_vision": "enters with the decoder's input embeddings", "gemma3n": "no vision tower"}
"""Families whose tower attention cannot be assigned to vision tokens, and the reason."""


class _Stopped(Exception):
    pass


def vision_of(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Vision tokens of a prompt, bool ``[batch, length]``."""
    return find_backbone(model).vision_mask(inputs["input_ids"]) & inputs["attention_mask"].bool()


def owners(model: PreTrainedModel, block: nn.Module, inputs: Inputs) -> list[list[int]]:
    """For every vision token, the positions of ``block``'s output that change its embedding: a Jacobian, row by row."""
    outputs: list[Tensor] = []
    backbone = find_backbone(model)
    embeddings: list[Tensor] = []

    def on_block(_module: nn.Module, _args: Any, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).detach().requires_grad_()
        outputs.append(states)
        return (states.clone(), *output[1:]) if isinstance(output, tuple) else states.clone()

    def on_layer(_module: nn.Module, args: Any, kwargs: Any) -> None:
        embeddings.append(args[0] if args else kwargs["hidden_states"])
        raise _Stopped

    hooks = [
        block.register_forward_hook(on_block, prepend=True),
        backbone.layers[0].register_forward_pre_hook(on_layer, with_kwargs=True),
    ]
    try:
        with torch.enable_grad():
            model(**inputs, use_cache=False)
    except _Stopped:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    tokens = embeddings[0][vision_of(model, inputs)]
    generator = torch.Generator().manual_seed(5)
    found = []
    for token in tokens:
        seed = torch.randn(token.shape, generator=generator)
        gradients = torch.autograd.grad(token, outputs, seed, retain_graph=True, allow_unused=True)
        flat = [
            torch.zeros(states[..., 0].numel()) if gradient is None else gradient.abs().amax(-1).flatten()
            for gradient, states in zip(gradients, outputs, strict=True)
        ]
        found.append(torch.cat(flat).nonzero().flatten().tolist())
    return found


@dataclass
class Recorded:
    """Attention of the tower's blocks in one forward, by block, in the order of calls."""

    maps: dict[int, list[tuple[Tensor, Tensor | None]]] = field(default_factory=dict)
    keys: dict[int, list[Tensor]] = field(default_factory=dict)
    states: dict[int, list[Tensor]] = field(default_factory=dict)

    def received(self, block: int) -> Tensor:
        """Mean over heads and over the queries that can attend to a position, ``[positions]``."""
        parts = []
        for maps, mask in self.maps[block]:
            batch, _, length, _ = maps.shape
            seen = torch.ones(batch, length, length, dtype=torch.bool)
            if mask is not None:
                open_ = mask if mask.dtype == torch.bool else mask == 0
                seen = open_[:, 0].expand(batch, length, length)
            real = seen.any(1)  # somebody attends to it: not padding
            for row in range(batch):
                for position in range(length):
                    queries = seen[row, :, position] & real[row]
                    values = maps[row, :, queries, position]
                    parts.append(values.mean() if queries.any() else torch.tensor(0.0))
        return torch.stack(parts)

    def row_of(self, block: int, query: int) -> Tensor:
        """Attention of one query of every sequence, mean over heads, ``[positions]``."""
        return torch.cat([maps[:, :, query].mean(1).flatten() for maps, _ in self.maps[block]])

    def mean_keys(self, block: int) -> Tensor:
        """Keys after RoPE, mean over heads, ``[positions, head_dim]``."""
        return torch.cat([key.mean(1).flatten(0, 1) for key in self.keys[block]])

    def flat_states(self, block: int) -> Tensor:
        """Outputs of the block, ``[positions, width]``."""
        return torch.cat([states.reshape(-1, states.shape[-1]) for states in self.states[block]])


def record(model: PreTrainedModel, blocks: nn.ModuleList, inputs: Inputs) -> Recorded:
    """Run ``model``, built with eager attention, and record its tower's maps, keys and states."""
    recorded = Recorded()
    with ExitStack() as undo, torch.no_grad():
        undo.enter_context(_recording(blocks, recorded))
        for index, block in enumerate(blocks):

            def on_block(_module: Any, _args: Any, output: Any, index: int = index) -> None:
                states = output[0] if isinstance(output, tuple) else output
                recorded.states.setdefault(index, []).append(states)

            undo.callback(block.register_forward_hook(on_block).remove)
        model(**inputs, use_cache=False)
    return recorded


@contextmanager
def _recording(blocks: nn.ModuleList, recorded: Recorded) -> Iterator[None]:
    block_of = {module: index for index, block in enumerate(blocks) for module in block.modules()}
    source = sys.modules[type(blocks[0]).__module__]

    def recorder(eager: Callable[..., Any]) -> Callable[..., Any]:
        def run(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
        ):
            output, maps = eager(module, query, key, value, attention_mask, **kwargs)
            if module in block_of:
                recorded.maps.setdefault(block_of[module], []).append((maps, attention_mask))
                recorded.keys.setdefault(block_of[module], []).append(key)
            return output, maps

        return run

    with ExitStack() as undo:
        for name, value in list(vars(source).items()):
            if name.endswith("eager_attention_forward"):
                undo.enter_context(patch.object(source, name, recorder(value)))
        yield


def mean_over(values: Tensor, groups: list[list[int]]) -> Tensor:
    """Mean of ``values`` (``[positions]`` or ``[positions, width]``) over each group; NaN for an empty one."""
    empty = torch.full(values.shape[1:], float("nan"))
    return torch.stack([values[group].mean(0) if group else empty for group in groups])
