"""What both detectors share: names, errors, reproducible typed results."""

from __future__ import annotations

import json

import numpy as np
import pytest

from schedule_finder.change_points import DEFAULT_DETECTOR, DETECTORS, get_detector
from tests.support.planted_maps import planted_maps


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detection_is_named_reproducible_and_json(name: str) -> None:
    maps = planted_maps(16, (5,), noise=1.0)
    first, second, other = (get_detector(name).detect(maps, seed=seed) for seed in (5, 5, 6))
    assert first == second
    assert first.detector == name == get_detector(name).name
    document = first.to_json()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert other.evidence != first.evidence


@pytest.mark.parametrize("name", DETECTORS)
def test_maps_without_any_attention_give_no_change_point_and_say_so(name: str) -> None:
    found = get_detector(name).detect([np.zeros((12, 8))] * 3)
    assert found.change_points == []
    assert "too few" in str(found.evidence.reason)


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("bad", [[], [np.full((12, 4), np.nan)], [np.ones((12, 4)), np.ones((11, 4))]])
def test_bad_maps_are_refused(name: str, bad: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="maps"):
        get_detector(name).detect(bad)


def test_detectors_are_found_by_name_old_or_new() -> None:
    assert DEFAULT_DETECTOR in DETECTORS
    assert get_detector("distribution_shift").name == "attention_shift"
    with pytest.raises(ValueError, match="attention_shift, token_curve"):
        get_detector("eye")
