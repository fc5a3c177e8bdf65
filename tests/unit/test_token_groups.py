"""Vision tokens as dense groups: images, shares of the kept tokens, and the way to the groups and back."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
import torch
from torch import Tensor

from pruning_runtime.merging import join_dropped
from pruning_runtime.token_groups import (
    FrameProblem,
    TokenGroups,
    frame_problems,
    image_counts,
    image_numbers,
    proportional_shares,
)


def rows_of(*rows: str) -> Tensor:
    """``v`` is a vision token; rows are padded on the left."""
    length = max(map(len, rows))
    return torch.tensor([[letter == "v" for letter in row.rjust(length, ".")] for row in rows])


def numbers(vision: Tensor) -> list[list[int]]:
    """Images of the vision tokens, row by row."""
    images = image_numbers(vision)
    return [row[is_vision].tolist() for row, is_vision in zip(images, vision, strict=True)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("tvvvt", [0, 0, 0]),
        ("vvttvt", [0, 0, 1]),
        ("vvtvvtvv", [0, 0, 0, 0, 0, 0]),  # single tokens between runs end rows of patches
        ("vvttvvtvvttv", [0, 0, 1, 1, 1, 1, 2]),
        ("ttv", [0]),
        ("ttt", []),
    ],
)
def test_an_image_is_a_run_of_vision_tokens(row: str, expected: list[int]) -> None:
    assert numbers(rows_of(row)) == [expected]


def test_images_are_numbered_and_counted_by_row() -> None:
    vision = rows_of("vvttvvvtt", "tt", "tvtttvvt")
    assert numbers(vision) == [[0, 0, 1, 1, 1], [], [0, 1, 1]]
    images, largest = image_counts(vision, image_numbers(vision))
    assert images.tolist() == [2, 0, 2]
    assert largest.tolist() == [3, 0, 2]


def test_shares_are_whole_proportional_and_of_the_right_sum() -> None:
    generator = np.random.default_rng(0)
    for _ in range(500):
        sizes = generator.integers(0, 40, (3, int(generator.integers(1, 8))))
        total = np.array([generator.integers(0, row.sum() + 1) for row in sizes])
        shares = proportional_shares(torch.tensor(total), torch.tensor(sizes)).numpy()
        assert (shares.sum(1) == total).all()
        assert (shares >= 0).all()
        assert (shares <= sizes).all()
        exact = total[:, None] * sizes / np.maximum(sizes.sum(1, keepdims=True), 1)
        assert (np.abs(shares - exact) < 1).all()


def test_equal_remainders_go_to_the_first_groups() -> None:
    assert proportional_shares(torch.tensor([5]), torch.tensor([[8, 8, 8]])).tolist() == [[2, 2, 1]]
    assert proportional_shares(torch.tensor([2]), torch.tensor([[0, 8, 8, 8]])).tolist() == [[0, 1, 1, 0]]


def random_groups(seed: int) -> tuple[Tensor, TokenGroups]:
    generator = torch.Generator().manual_seed(seed)
    vision = torch.rand(3, 25, generator=generator) < (0.2 + 0.15 * (seed % 5))
    vision[seed % 3] = False  # a row without vision tokens
    images = image_numbers(vision)
    number, largest = image_counts(vision, images)
    keep = vision.sum(1) // 2
    slots = int(largest.max()) + seed % 2  # more slots than needed, as at static shapes
    return vision, TokenGroups.of(vision, images, keep, max(int(number.max()), 1), max(slots, 1))


@pytest.mark.parametrize("seed", range(20))
def test_gather_and_scatter_are_inverse(seed: int) -> None:
    vision, groups = random_groups(seed)
    images = image_numbers(vision)
    values = torch.randn(3, 25, 4, generator=torch.Generator().manual_seed(seed))
    gathered = groups.gather(values).view(3, groups.index.shape[1], -1, 4)
    for row in range(3):
        for image in range(groups.index.shape[1]):
            own = values[row, vision[row] & (images[row] == image)]
            assert torch.equal(gathered[row, image, : len(own)], own)
            assert not gathered[row, image, len(own) :].any()
            assert groups.is_token[row, image].sum() == len(own)
    back = groups.scatter(groups.gather(values[..., 0]), 25, fill=-9.0)
    assert torch.equal(back, values[..., 0].masked_fill(~vision, -9.0))
    assert torch.equal(groups.keep.sum(1), vision.sum(1) // 2)


@pytest.mark.parametrize("seed", range(20))
def test_put_changes_the_marked_tokens_only(seed: int) -> None:
    _, groups = random_groups(seed)
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(3, 25, 4, generator=generator)
    gathered = groups.gather(states)
    assert torch.equal(groups.put(states, gathered, torch.ones(gathered.shape[:2], dtype=torch.bool)), states)
    where = torch.rand(gathered.shape[:2], generator=generator) < 0.5
    marked = groups.scatter(where.float(), 25, 0.0) > 0
    expected = torch.where(marked[..., None], states + 1, states)
    assert torch.equal(groups.put(states, gathered + 1, where), expected)


@pytest.mark.parametrize("joining", ["mean", "add_mean"])
@pytest.mark.parametrize("seed", range(10))
def test_join_dropped_by_loops(joining: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 12, 3, generator=generator, dtype=torch.float64)
    kept = torch.rand(2, 12, generator=generator) < 0.4
    kept[:, seed] = True
    target = torch.randint(12, (2, 12), generator=generator).where(~kept, torch.arange(12))
    found = join_dropped(features, kept, target, joining)
    for row in range(2):
        for slot in range(12):
            # A target that is not kept takes nothing: the dropped token is discarded.
            joined = [
                features[row, other]
                for other in range(12)
                if not kept[row, other] and target[row, other] == slot
            ]
            expected = features[row, slot]
            if kept[row, slot] and joined:
                if joining == "mean":
                    expected = torch.stack([expected, *joined]).mean(0)
                else:
                    expected = expected + torch.stack(joined).mean(0)
            torch.testing.assert_close(found[row, slot], expected)


NONE, UNEQUAL, TOO_FEW = FrameProblem


@pytest.mark.parametrize(
    ("row", "frame_tokens", "fewest", "newlines", "problem"),
    [
        ("vvvvttvvvvt", None, 2, False, NONE),
        ("vvvvttvvvt", None, 1, False, UNEQUAL),
        ("vvvvt", None, 2, False, TOO_FEW),
        ("vvvvt", None, 1, False, NONE),
        ("vvvvt", 2, 2, False, NONE),
        ("vvvvvt", 2, 2, False, UNEQUAL),
        ("vvvvvt", 2, 2, True, NONE),
        ("vvvvvvttvvvvt", 2, 2, False, NONE),
        ("vvvvvvttvvvt", 2, 1, False, UNEQUAL),
        ("vvvvttvvt", 2, 2, False, TOO_FEW),
        ("tttt", 2, 2, False, NONE),
        ("tttt", None, 2, False, NONE),
    ],
)
def test_why_tokens_are_no_frames(
    row: str, frame_tokens: int | None, fewest: int, newlines: bool, problem: FrameProblem
) -> None:
    vision = rows_of(row, "ttttttttttttttt", "vvvvttvvvv")
    found = frame_problems(vision, image_numbers(vision), frame_tokens, fewest, newlines)
    assert found.tolist() == [problem, NONE, NONE]


def test_runs_are_what_groupby_finds() -> None:
    """Without single tokens between runs, images are plain runs."""
    generator = np.random.default_rng(1)
    for _ in range(50):
        row = "".join(
            "v" * int(generator.integers(1, 5)) + "t" * int(generator.integers(2, 4)) for _ in range(4)
        )
        runs = [len(list(run)) for letter, run in groupby(row) if letter == "v"]
        assert numbers(rows_of(row)) == [[image for image, size in enumerate(runs) for _ in range(size)]]
