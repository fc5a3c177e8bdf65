"""Where stages go, given change points; and whether views of a profile agree."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedule_finder.change_points import candidate_layers, without_isolated
from schedule_finder.change_points.views import compare_views


def test_a_stage_stands_at_the_end_of_each_regime_but_the_last() -> None:
    assert candidate_layers([9, 20], 30) == [8, 19]
    assert candidate_layers([], 30) == []
    assert candidate_layers([9, 20], 30, isolated=[8, 18, 19]) == [7, 17]


@given(st.sets(st.integers(1, 29)), st.sets(st.integers(0, 29)))
def test_candidates_are_regular_layers_of_their_regime(points: set[int], isolated: set[int]) -> None:
    found = candidate_layers(sorted(points), 30, isolated)
    assert found == sorted(set(found))
    assert not set(found) & isolated
    bounds = [0, *sorted(points)]
    regular = [
        [layer for layer in range(a, b) if layer not in isolated] for a, b in itertools.pairwise(bounds)
    ]
    assert found == [layers[-1] for layers in regular if layers]


@pytest.mark.parametrize("point", [0, 30])
def test_change_points_outside_the_decoder_are_refused(point: int) -> None:
    with pytest.raises(ValueError, match="1 to 29"):
        candidate_layers([point], 30)


def test_isolated_layers_are_left_out_unless_nothing_else_is_there() -> None:
    assert without_isolated([3, 4, 5], [4]) == [3, 5]
    assert without_isolated([4], [4]) == [4]


def test_views_agree_to_within_a_layer_or_the_sentence_says_how_they_differ() -> None:
    assert "same change points" in compare_views([9, 20], {"text_guided": [8, 20], "vision_mass": [9, 21]})
    sentence = compare_views([9, 20], {"text_guided": [9, 20], "vision_mass": [2]})
    assert sentence.startswith("views disagree")
    assert "vision_mass has 2" in sentence
    assert "text_guided" not in sentence
    assert compare_views([9], {}) == ""
