"""The sample of text queries: how many, which, and that means over it are right on average."""

from __future__ import annotations

import pytest
import torch

from schedule_finder.profiling.drawn_queries import draw_queries


def rows_of(*counts: int, length: int = 400) -> torch.Tensor:
    """Rows with so many text queries at every second position, the last ones at the end."""
    text = torch.zeros(len(counts), length, dtype=torch.bool)
    for row, count in enumerate(counts):
        text[row, length - 2 * count :: 2] = True
    return text


@pytest.mark.parametrize("most", [1, 2, 7, 64])
def test_exactly_so_many_of_the_text_queries_with_the_last(most: int) -> None:
    text = rows_of(200, most + 1, most, 1)
    drawn = draw_queries(text, most)
    assert drawn.sum(1).tolist() == [most, most, most, 1]
    assert not (drawn & ~text).any()
    for row in range(4):
        assert drawn[row].nonzero()[-1] == text[row].nonzero()[-1]
    assert torch.equal(drawn[2:], text[2:])


def test_a_row_draws_the_same_in_any_batch_and_with_any_padding() -> None:
    alone = draw_queries(rows_of(150), 40)
    beside = draw_queries(rows_of(90, 150, 17), 40)[1:2]
    padded = draw_queries(torch.cat([torch.zeros(1, 33, dtype=torch.bool), rows_of(150)], 1), 40)
    assert torch.equal(alone, beside)
    assert torch.equal(alone, padded[:, 33:])


def test_every_stretch_of_the_text_gives_one() -> None:
    text = torch.ones(1, 120, dtype=torch.bool)
    assert draw_queries(text, 30).view(30, 4).sum(1).tolist() == [1] * 30


def test_every_position_but_of_the_last_stretch_is_as_likely() -> None:
    """Over many lengths, the place within a stretch is uniform: its mean is half of the stretch."""
    places = []
    for count in range(100, 400):
        drawn = draw_queries(torch.ones(1, 4 * count, dtype=torch.bool), count)
        places.append(drawn.view(count, 4)[:-1].float().argmax(1))
    shares = torch.cat(places).bincount(minlength=4) / len(torch.cat(places))
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.01)  # 75 000 draws: 6 standard errors
