"""The baseline that runs eager attention at its stages and scores on the host, as published code often does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pruning_runtime import Schedule
from pruning_runtime.backbone import Backbone
from pruning_runtime.costs import kept_per_layer
from schedule_finder.benchmark.clock import PartClock


@contextmanager
def eager_stages(
    backbone: Backbone, schedule: Schedule, num_vision: int, first: int, clock: PartClock
) -> Iterator[None]:
    """Stage layers run eager attention and score its whole maps row by row on the host, by the text-guided rule.

    Prompts have the layout of `synthetic_inputs`: text, vision from position ``first`` on, text.
    """
    kept = [(stage.layer, stage.kept(num_vision)) for stage in schedule.stages]
    kept_before = kept_per_layer(kept, num_vision, schedule.backbone.num_layers)
    with ExitStack() as undo:
        for stage in schedule.stages:
            if stage.layer < 0:
                continue
            attention: Any = backbone.layers[stage.layer].self_attn
            undo.callback(setattr, attention, "config", attention.config)
            attention.config = copy.deepcopy(attention.config)
            attention.config._attn_implementation = "eager"
            score = _host_scoring(first, kept_before[stage.layer], stage.kept(num_vision), clock)
            undo.callback(attention.register_forward_pre_hook(_with_causal_mask, with_kwargs=True).remove)
            undo.callback(attention.register_forward_hook(score).remove)
        yield


def _with_causal_mask(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Eager attention needs an explicit causal mask."""
    hidden = kwargs["hidden_states"]
    length = hidden.shape[1]
    if length == 1:
        return None
    lowest = torch.finfo(hidden.dtype).min
    mask = torch.full((length, length), lowest, dtype=hidden.dtype, device=hidden.device).triu(1)
    return args, {**kwargs, "attention_mask": mask[None, None]}


def _host_scoring(first: int, num_vision: int, keep: int, clock: PartClock) -> Callable[..., None]:
    def score(_module: nn.Module, _args: Any, output: Any) -> None:
        maps: Tensor = output[1]
        length = maps.shape[-1]
        if maps.shape[-2] == 1:
            return  # decoding
        clock.enter("scoring")
        vision, text = slice(first, first + num_vision), slice(first + num_vision, length)
        for row in maps:
            among = row[:, text, text]
            weights = among.sum(1) + among.sum(2) - among.diagonal(dim1=1, dim2=2)
            scores = (weights[..., None] * row[:, text, vision]).sum((0, 1))
            kept = sorted(scores.topk(keep).indices.tolist())
            positions = [
                *range(first),
                *(first + index for index in kept),
                *range(first + num_vision, length),
            ]
            torch.tensor(positions, device=maps.device)
        clock.leave()

    return score
