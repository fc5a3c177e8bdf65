"""Generations on the fast path, compared with the plain one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from pruning_runtime import Record, Schedule, pruned
from tests.support import greedy
from tests.support.rounding import rounding_bound
from tests.support.tiny_models import Inputs

STEPS = 4
generate = functools.partial(greedy.generate, steps=STEPS)


@contextmanager
def fast(model: PreTrainedModel, schedule: Schedule, **options: Any) -> Iterator[Record]:
    """`pruned` on the fast path; falling back to the plain one is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fast=True.*plain path")
        warnings.filterwarnings("ignore", message="fast=True: there are no CUDA graphs")
        with pruned(model, schedule, fast=True, **options) as record:
            yield record


def states(cache: Cache | None) -> list[Tensor]:
    """Keys and values of all layers."""
    assert cache is not None
    return [state for layer in cache.layers for state in (layer.keys, layer.values)]


def assert_same(found: Record, expected: Record, bound: float) -> None:
    """Both records tell of the same prefill, whose caches hold the same keys and values."""
    assert found.tokens_per_layer == expected.tokens_per_layer
    for one, other in zip(found.stages, expected.stages, strict=True):
        assert (one.layer, one.keep) == (other.layer, other.keep)
        assert one.kept_positions() == other.kept_positions()
    for one, other in zip(states(found.cache), states(expected.cache), strict=True):
        assert one.shape == other.shape
    assert found.cache is not None
    assert expected.cache is not None
    prompts = found.cache.pruned_prompt, expected.cache.pruned_prompt
    assert prompts[0].segment_of_layer == prompts[1].segment_of_layer
    for layer, (one, other) in enumerate(zip(found.cache.layers, expected.cache.layers, strict=True)):
        real = prompts[1].of(layer, one.keys.device).valid
        assert torch.equal(real, prompts[0].of(layer, one.keys.device).valid)
        generated = one.keys.shape[2] - real.shape[1]  # a layer with a window may hold fewer
        if generated >= 0:
            real = torch.cat([real, torch.ones(len(real), generated, dtype=torch.bool)], 1)
            for mine, its in ((one.keys, other.keys), (one.values, other.values)):
                difference = (mine - its).abs().amax((1, 3))
                assert difference[real].max() < bound


def check(
    model: PreTrainedModel, inputs: Inputs, schedule: Schedule, steps: int = STEPS, **options: Any
) -> Record:
    """Compare a generation on the fast path with one on the plain path."""
    with pruned(model, schedule, **options) as expected:
        tokens, logits = generate(model, inputs, steps=steps)
    with fast(model, schedule, **options) as record:
        fast_tokens, fast_logits = generate(model, inputs, steps=steps)
    assert (record.prefills, record.fast_prefills, record.captures) == (1, 1, 1)
    assert (fast_logits - logits).abs().max() < rounding_bound(model, inputs)
    assert torch.equal(fast_tokens, tokens)
    assert_same(record, expected, rounding_bound(model, inputs))
    return record
