"""Greedy coverage by updates against sums over all rows: the same choices, ties included."""

from __future__ import annotations

import pytest
import torch

from pruning_runtime.scorers.coverage import Coverage
from pruning_runtime.scorers.similarity import cosine, greedy_scores


def plain_scores(shares: torch.Tensor, weight: torch.Tensor, steps: int) -> torch.Tensor:
    """Gains summed over all rows in every step."""
    covered = shares.new_zeros(len(shares), 1, shares.shape[2])

    def gains() -> torch.Tensor:
        return (shares - covered).clamp(min=0).sum(2) * weight

    def choose(slot: torch.Tensor) -> None:
        nonlocal covered
        covered = covered.maximum(shares.gather(1, slot[..., None].expand(-1, 1, shares.shape[2])))

    return greedy_scores(torch.ones(shares.shape[:2], dtype=torch.bool), steps, gains, choose)


def shares_of(kind: str, seed: int) -> torch.Tensor:
    """``[3, 60, 60]`` of random features: spread, in clusters, in exact copies, or with zero rows."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3, 60, 8, generator=generator)
    if kind == "clusters":
        features = features[:, :5].repeat_interleave(12, 1) + 0.01 * features
    elif kind == "copies":
        features = features[:, :5].repeat(1, 12, 1)
    elif kind == "zeros":
        features[:, ::2] = 0
    return cosine(features, features) if seed % 2 else (cosine(features, features) / 0.2).softmax(2)


@pytest.mark.parametrize("kind", ["spread", "clusters", "copies", "zeros"])
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("steps", [1, 10, 60])
def test_the_choices_are_those_of_plain_sums(kind: str, seed: int, steps: int) -> None:
    shares = shares_of(kind, seed).contiguous()
    weight = (
        torch.rand(3, 60, generator=torch.Generator().manual_seed(seed)) if seed % 3 else torch.ones(3, 60)
    )
    cover = Coverage(shares, weight)
    found = greedy_scores(torch.ones(3, 60, dtype=torch.bool), steps, cover.gains, cover.choose)
    assert torch.equal(found, plain_scores(shares, weight, steps))


def test_later_steps_touch_few_rows() -> None:
    """What the updates are for: over all choices, a row changes a few times, not once per choice."""
    shares = shares_of("spread", 1).contiguous()[:1]
    cover, changed = Coverage(shares), 0
    for _ in range(30):
        before = cover._covered.clone()
        cover.choose(cover.gains().argmax(1, keepdim=True))
        changed += int((cover._covered > before).sum())
    assert changed < 30 * 60 / 3
