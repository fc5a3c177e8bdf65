"""Pieces of the evaluation that need no model."""

from __future__ import annotations

import pytest

from schedule_finder.evaluation.metrics import same_answer


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("Red", "red", True),
        (" the red star. ", "red star", True),
        ("red", "blue", False),
        ("", "red", False),
        ("10", "1", False),
        ("an apple", "apple", True),
    ],
)
def test_same_answer(found: str, expected: str, same: bool) -> None:
    assert same_answer(found, expected) is same
