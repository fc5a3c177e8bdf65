"""What a change-point detector returns, and the names under which detectors are found.

A change point ``l`` is the 0-based first layer of a new regime. Its last layer before the change, ``l - 1``, is
where a stage would score and prune. All layers are numbered as in the backbone.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

REPORTED_SUPPORT = 0.5
"""Changes and isolated layers below this support are not reported: less than every second resample has them.
Meinshausen and Buehlmann (2010) bound the expected number of false selections for thresholds above one half only."""
USED_SUPPORT = 0.9
"""Schedules use changes and isolated layers from this support on, the upper end of the range (.6 to .9) that
Meinshausen and Buehlmann recommend."""

ALIASES = {"distribution_shift": "attention_shift"}
"""Old names of detectors, accepted wherever a name is read."""


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Change(_Result):
    """A change point.

    Attributes:
        layer: first layer of the new regime.
        support: share of bootstrap resamples and split halves of the samples in which it is found within one
            layer, in [0, 1]; None for a detector that does not compute it.
        effect: distance between the two regimes over the mean distance of two layers of one regime. The
            distance between regimes is unbiased: 0 is expected where nothing changes.
        gain: what leaving this change out would add to the cost, over the penalty for one change; above 1.
    """

    layer: int
    support: float | None = None
    effect: float | None = None
    gain: float | None = None


class Regime(_Result):
    """Contiguous layers, ``first`` to ``last``, of one regime; a regime that returns keeps its ``cluster``."""

    first: int
    last: int
    cluster: int


class IsolatedLayer(_Result):
    """One layer that attends elsewhere, while the layers around it do not change.

    Attributes:
        layer: the layer.
        distance: its own part of the distance to the other layers of its regime (`noise_model`), nats.
        shared: attention pattern that it shares with its regime, over what two layers of the regime share: 1 for
            a layer that differs by noise only, 0 or less for one that attends to other tokens.
        nearest: the layer with the smallest distance to it.
        nearest_distance: that distance, nats.
        support: share of resamples and halves in which it is isolated, in [0, 1].
    """

    layer: int
    distance: float
    shared: float
    nearest: int
    nearest_distance: float
    support: float


class Interval(_Result):
    """Mean over samples with its confidence interval, each with one value per gap; None where none is known."""

    unit: str
    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]
    level: float


class ShiftEvidence(_Result):
    """Why `attention_shift` found what it found.

    Attributes:
        num_layers: layers with a profile.
        reason: why nothing was searched; None where it was.
        num_samples: samples.
        layers: layers that were segmented; entry ``i`` of everything below is about ``layers[i]``.
        distance: mean distance of every two layers, nats.
        own: each layer's own part of its distances, nats (`noise_model`).
        own_error: its standard error over samples, nats.
        drift: distance that the random walk adds per layer, nats.
        dimensions: effective dimensions of the layers' differences.
        penalty: per change, in units of the cost.
        level: share of simulated profiles without a change in which this penalty finds none.
        shift: distance of neighbouring layers, entry ``i`` from ``layers[i]`` to ``layers[i + 1]``.
        expected_shift: the same distance where nothing changes: both layers' own parts and the drift.
    """

    kind: Literal["attention_shift"] = "attention_shift"
    num_layers: int
    reason: str | None = None
    num_samples: int = 0
    layers: list[int] = Field(default_factory=list)
    distance: list[list[float]] = Field(default_factory=list)
    own: list[float] = Field(default_factory=list)
    own_error: list[float] = Field(default_factory=list)
    drift: float = 0.0
    dimensions: int = 0
    penalty: float = 0.0
    level: float = 0.0
    shift: Interval | None = None
    expected_shift: list[float] = Field(default_factory=list)

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        """One entry per layer, pair of layers, or pair of neighbours; layers rise."""
        count, gaps = len(self.layers), max(len(self.layers) - 1, 0)
        if any(b <= a for a, b in pairwise([-1, *self.layers])):
            raise ValueError("layers do not rise from 0 on")
        lengths = {
            "distance": (len(self.distance), count),
            "expected_shift": (len(self.expected_shift), gaps),
            **{f"distance[{i}]": (len(row), count) for i, row in enumerate(self.distance)},
            **{name: (len(getattr(self, name)), count) for name in ("own", "own_error")},
        }
        if self.shift is not None:
            parts = {"mean": self.shift.mean, "low": self.shift.low, "high": self.shift.high}
            lengths |= {f"shift.{name}": (len(values), gaps) for name, values in parts.items()}
        for name, (found, needed) in lengths.items():
            if found != needed:
                raise ValueError(f"{name} has {found} entries for {count} layers, need {needed}")
        return self


class CurveEvidence(_Result):
    """Why `token_curve` found what it found; entry ``i`` of a list is about breaks after the ``i``-th layer.

    Attributes:
        num_layers: layers with a profile.
        reason: why nothing was searched; None where it was.
        num_curves: tokens' curves.
        histogram: curves that break there.
        straight_ramp: the same for as many straight ramps.
        shuffled_layers: mean count where the layers of each sample are shuffled.
        excess_share: histogram less ``shuffled_layers``, over ``num_curves``.
        excess_threshold: what a peak has to exceed.
        level: share of shuffles whose largest excess is below the threshold.
    """

    kind: Literal["token_curve"] = "token_curve"
    num_layers: int
    reason: str | None = None
    num_curves: int = 0
    histogram: list[int] = Field(default_factory=list)
    straight_ramp: list[float] = Field(default_factory=list)
    shuffled_layers: list[float] = Field(default_factory=list)
    excess_share: list[float] = Field(default_factory=list)
    excess_threshold: float = 0.0
    level: float = 0.0


class ChangePoints(_Result):
    """What a detector found in a profile."""

    detector: str
    changes: list[Change]
    regimes: list[Regime] = Field(default_factory=list)
    isolated_layers: list[IsolatedLayer] = Field(default_factory=list)
    evidence: ShiftEvidence | CurveEvidence = Field(discriminator="kind")

    @property
    def change_points(self) -> list[int]:
        """Layers of all reported changes."""
        return [change.layer for change in self.changes]

    @property
    def used(self) -> list[int]:
        """Layers of the changes that schedules follow: those with enough support, or without a support."""
        return [
            change.layer
            for change in self.changes
            if change.support is None or change.support >= USED_SUPPORT
        ]

    @property
    def used_isolated(self) -> list[int]:
        """Isolated layers with enough support: never scoring layers by default."""
        return [layer.layer for layer in self.isolated_layers if layer.support >= USED_SUPPORT]

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``3_change_points.json``, with ``change_points`` and the ``used`` ones as plain lists."""
        lists = {"change_points": self.change_points, "used": self.used}
        return lists | self.model_dump(mode="json", exclude_none=True)


class Detector(Protocol):
    """Attention maps of a profile -> change points."""

    @property
    def name(self) -> str:
        """Its name in the registry."""
        ...

    def detect(
        self, maps: Iterable[np.ndarray], *, layers: Sequence[int] | None = None, seed: int = 0
    ) -> ChangePoints:
        """Find the change points of ``maps``.

        Args:
            maps: one ``[num_layers, num_vision]`` per sample; the number of vision tokens may differ.
            layers: the backbone's number of each row; by default 0, 1, 2, ...
            seed: draws whatever is random.
        """
        ...


def canonical_name(name: str) -> str:
    """The name under which a detector is registered today."""
    return ALIASES.get(name, name)
