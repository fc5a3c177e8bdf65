"""What a profile's facts must be before anything is computed from them."""

from __future__ import annotations

import pytest

from schedule_finder.run.schema import problem_of_meta


def test_layers_that_rise_from_0_are_fine() -> None:
    assert problem_of_meta({"layers": [0, 3, 7]}) is None
    assert problem_of_meta({}) is None


@pytest.mark.parametrize("layers", [[1, 0], [0, 0, 1], [-1, 0]])
def test_layers_in_another_order_are_refused(layers: list[int]) -> None:
    assert problem_of_meta({"layers": layers}) == "`layers`: must be layer numbers in rising order"
