"""Half and double of every constant of `attention_shift`: does the value matter?"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from schedule_finder.change_points import AttentionShift
from schedule_finder.change_points.distances import LayerDistances, layer_distances
from tests.support.planted_cases import CONDITIONS, Truth, same_boundaries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WATCHED = ("noise 1", "noise 1, correlated 0.5", "noise 0.3-2, growing", "noise 0.5, drift 0.15")
"""Moderate noise, and the conditions in which the detector's assumptions do not hold."""
LAYERS = (12, 40)
PACKAGE = "schedule_finder.change_points."
CONSTANTS: dict[str, tuple[float, ...]] = {
    "attention_shift.SMALLEST_CHANGE": (0.005, 0.02),
    "attention_shift.DRIFT_MARGIN": (0.5, 2.0),
    "attention_shift.CLEAR_EFFECT": (0.5, 2.0),
    "confirmation.NEAR": (2, 8),
    "confirmation.ABRUPT": (0.25, 1.0),
    "noise_model.SMALLEST_OWN": (0.00125, 0.005),
    "noise_model.NEIGHBOURS": (2, 6),
    "noise_model.MOST_DIMENSIONS": (10, 40),
    "noise_model.SMALLEST_DRIFT": (5e-5, 2e-4),
    "permutation.BLOCK": (2, 6),
    "segmentation.MOST_BREAKS": (2, 10),
    "isolated.SHARED": (0.125, 0.5),
    "isolated.LEVEL": (0.025, 0.1),
    "isolated.SMALLEST_SPREAD": (0.25, 1.0),
    "isolated.MATES": (6, 24),
}
"""Module and name of each constant with about half and double its value. The level of the penalty comes with them:
2 %, 1 % and .5 % chance."""

Cases = dict[str, list[tuple[int, Truth, LayerDistances]]]


def print_sensitivity(first: int, seeds: int, plant_cases: Callable[..., Any]) -> list[dict[str, Any]]:
    """Print, for each value of each constant, the found and false alarms in percent of all cases."""
    cases: Cases = {}
    for shifts in (False, True):
        planted = (
            case
            for name in WATCHED
            for case in plant_cases(CONDITIONS[name], shifts, range(first, first + seeds), layers=LAYERS)
        )
        cases["found" if shifts else "false alarms"] = [
            (seed, truth, layer_distances(maps)) for seed, truth, maps in planted
        ]
    print(
        f"{len(cases['found'])} cases with and {len(cases['false alarms'])} without changes: {'; '.join(WATCHED)}"
    )
    print(f"{'constant':34} {'value':>8} {'found':>6} {'alarms':>6} {'named':>6} {'falsely':>8}")
    rows = [_measured("(default)", 0.0, cases)]
    rows += [_measured("AttentionShift.level", level, cases, level=level) for level in (0.98, 0.995)]
    for name, values in CONSTANTS.items():
        for value in values:
            with changed(name, value):
                rows.append(_measured(name, value, cases))
    return rows


@contextlib.contextmanager
def changed(name: str, value: float) -> Iterator[None]:
    """Give a constant another value in every module of the package that has it."""
    name = name.split(".")[-1]
    holders = [
        module for key, module in sys.modules.items() if key.startswith(PACKAGE) and hasattr(module, name)
    ]
    if not holders:
        raise ValueError(f"{name}: no module of {PACKAGE} has it")
    before = getattr(holders[0], name)
    for module in holders:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module in holders:
            setattr(module, name, before)


def _measured(name: str, value: float, cases: Cases, level: float = 0.99) -> dict[str, Any]:
    detector = AttentionShift(level=level, simulations=100, resamples=8)
    hits: dict[str, list[bool]] = {"found": [], "false alarms": [], "named": [], "falsely": []}
    for kind, some in cases.items():
        for seed, truth, distances in some:
            found = detector.detect_in(distances, seed=seed)
            isolated = {layer.layer for layer in found.isolated_layers}
            right = same_boundaries(found.change_points, truth)
            hits[kind].append(right if kind == "found" else not right)
            if truth.isolated:
                hits["named"].append(isolated >= set(truth.isolated))
            hits["falsely"].append(bool(isolated - set(truth.isolated)))
    shares = {key: 100 * sum(some) / max(len(some), 1) for key, some in hits.items()}
    numbers = " ".join(
        f"{share:{width}.0f}" for share, width in zip(shares.values(), (6, 6, 6, 8), strict=True)
    )
    print(f"{name:34} {value:8g} {numbers}", flush=True)
    return {"constant": name, "value": value} | shares
