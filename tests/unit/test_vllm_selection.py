"""Which tokens the vLLM plug-in keeps, and the positions that travel with them; nothing here needs vLLM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pruning_runtime.scorers import make_scorer
from pruning_runtime.vllm.positions import (
    LARGEST,
    computed_slots,
    grid_positions,
    position_before,
    split_numbers,
    with_numbers,
)
from pruning_runtime.vllm.selection import kept_indices, newline_mask
from tests.support.rule_references import divprune, greedy

TOKENS, WIDTH = 24, 16


def features(seed: int = 0, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_all_tokens_need_no_scorer() -> None:
    assert kept_indices(features(), TOKENS, make_scorer("divprune")).tolist() == list(range(TOKENS))


@pytest.mark.parametrize("keep", [1, 5, 12, 23])
def test_strided_tokens_are_evenly_spread(keep: int) -> None:
    kept = kept_indices(features(), keep, make_scorer("strided"))
    expected = [rank for rank in range(TOKENS) if (rank + 1) * keep // TOKENS > rank * keep // TOKENS]
    assert kept.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [1, 2, 7, 20])
def test_divprune_is_the_published_rule(keep: int, dtype: torch.dtype) -> None:
    given = features(keep).to(dtype)
    kept = kept_indices(given, keep, make_scorer("divprune"))
    expected = greedy(divprune(given.double().numpy()), TOKENS, keep)
    assert kept.tolist() == sorted(expected)


@pytest.mark.parametrize("scorer", ["strided", "divprune"])
def test_image_newlines_are_kept_first_and_not_scored(scorer: str) -> None:
    given, newline = features(3), features(4)[0]
    given[[5, 11, 17]] = newline
    protected = newline_mask(given, newline)
    assert protected.nonzero()[:, 0].tolist() == [5, 11, 17]
    content = [slot for slot in range(TOKENS) if slot not in (5, 11, 17)]
    alone = kept_indices(given[content], 6, make_scorer(scorer)).tolist()
    kept = kept_indices(given, 9, make_scorer(scorer), protected).tolist()
    assert kept == sorted([5, 11, 17, *(content[index] for index in alone)])
    assert kept_indices(given, 2, make_scorer(scorer), protected).tolist() == [5, 11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_survive_every_dtype(dtype: torch.dtype) -> None:
    numbers = torch.tensor([[0, 1, 255], [256, 257, 4095], [65534, LARGEST, 33333]])
    given = features(tokens=3).to(dtype)
    wide = with_numbers(given, numbers)
    assert wide.shape == (3, WIDTH + 6)
    narrow, found = split_numbers(wide, 3)
    assert torch.equal(narrow, given)
    assert torch.equal(found, numbers)


def test_slots_of_a_step_and_the_text_before_them() -> None:
    ids = torch.tensor([9, 7, 7, 7, 9, 9, 8, 8, 9])
    assert computed_slots(ids, [7, 8], 2, 3).tolist() == [2, 3, 6]
    assert computed_slots(ids, [7, 8], 0, 0).tolist() == []
    positions = torch.tensor([0, 1, 1, 1, 40, 41, 42, 42, 60])
    slots = torch.tensor([1, 3, 6, 7])
    assert position_before(ids, [7, 8], positions, slots).tolist() == [0, 0, 41, 41]
    assert position_before(ids[1:], [7], positions[1:], torch.tensor([0])).tolist() == [-1]


def test_positions_of_a_grid_are_row_by_row() -> None:
    grid = grid_positions(2, 2, 3, 2.5)
    expected = np.indices((2, 2, 3)).reshape(3, -1).T
    assert grid[:, 1:].tolist() == expected[:, 1:].tolist()
    assert grid[:, 0].tolist() == [int(time * 2.5) for time in expected[:, 0]]
    assert grid_positions(1, 1, 1, 1.0).tolist() == [[0, 0, 0]]
