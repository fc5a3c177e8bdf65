"""Levels, bars, and the progress through them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from schedule_finder.demo import scenes
from scripts.demo_backbone.vocabulary import TRAINED_TYPES


@dataclass(frozen=True)
class Level:
    """Ends when each type named in `bars` is answered that well, or after `max_steps`."""

    types: tuple[str, ...]
    object_count: tuple[int, int]
    lr: float  # share of the peak learning rates
    bars: dict[str, float]
    max_steps: int


SINGLE_REGION_TYPES = ("colour", "shape", "at", "where")
WHOLE_IMAGE_TYPES = ("count_colour", "count_shape", "exists")
# Positions are learnt at full speed only, and what needs exact positions at half speed only. Relations come
# after their halves: asked from the start, they stayed at the share of a random neighbour for 1,600 steps.
LEVELS = (
    Level(("colour", "shape"), (2, 4), 1.0, {"colour": 0.85, "shape": 0.85}, 600),
    Level(("colour", "shape", "where"), (2, 4), 1.0, {"where": 0.75}, 700),
    Level(SINGLE_REGION_TYPES, (3, 6), 1.0, {"where": 0.8, "at": 0.75}, 700),
    Level(
        (*SINGLE_REGION_TYPES, *WHOLE_IMAGE_TYPES, *scenes.PRACTICE_TYPES),
        (3, 8),
        0.5,
        {"where": 0.9, "at": 0.9, "shifted_at": 0.75, "shifted_where": 0.75},
        900,
    ),
    Level(
        TRAINED_TYPES,
        scenes.OBJECT_COUNT,
        0.5,
        {"where": 0.95, "at": 0.93, "relation_colour": 0.9, "relation_shape": 0.9},
        1000,
    ),
)
MUON_DECAY = 0.3
WARM_UP = 100  # steps
DECAY_SHARE = 0.42  # of all steps; at least a third
LEAST_DECAY = 2000  # steps; counting is mostly learnt here
ALIGNMENT_BAR = 0.99  # of the object cells: colour, shape, row and column all right
ALIGNMENT_STEPS = (60, 400)  # fewest and most
ALIGNMENT_IMAGES = 48
# Of the alignment loss in the question phase: at 0.1 positions fade while nothing asks for them.
ALIGNMENT_WEIGHT = 0.3

# What a finished backbone has to reach. Accuracies are exact match on held-out samples.
SINGLE_REGION_BAR = 0.95  # mean over single-region types
ALL_TYPES_BAR = 0.90  # mean over all types
TYPE_BAR = 0.85  # each type
READABLE_BAR = 0.95  # of objects whose colour, shape, row and column can be read from the vision token
NORM_BAR = 200.0  # Euclidean norm of the last residual; runaway residuals never learnt positions
TEST_SAMPLES = 300  # per question type
BLIND_SAMPLES = 40  # per question type and layer, for the table that says where vision is needed


@dataclass
class Progress:
    """All that a resumed run has to know beside the weights and the optimisers."""

    levels: ClassVar[tuple[Level, ...]] = LEVELS
    types: ClassVar[tuple[str, ...]] = TRAINED_TYPES
    least_decay: ClassVar[int] = LEAST_DECAY
    decay_share: ClassVar[float] = DECAY_SHARE
    warm_up: ClassVar[int] = WARM_UP

    step: int = 0
    level: int = 0
    level_start: int = 0
    decay_start: int = 0
    stop: int = 0  # 0: the decay phase has not begun
    accuracy: dict[str, float] = field(default_factory=dict)  # running mean over about 20 batches
    loss: float = 0.0
    norm: float = 0.0
    readable: list[float] = field(default_factory=lambda: [0.0] * 5)
    seconds: float = 0.0
    history: list[str] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether the decay phase is over."""
        return 0 < self.stop <= self.step

    def lr_factor(self) -> float:
        """Share of the peak learning rates for the next step."""
        peak = self.levels[self.level].lr * min(1.0, (self.step + 1) / self.warm_up)
        if not self.stop:
            return peak
        return peak * (self.stop - self.step) / (self.stop - self.decay_start)

    def type_shares(self) -> tuple[tuple[str, float], ...]:
        """Types that are still answered wrongly are asked more often."""
        return tuple(
            (name, 0.15 + 1 - self.accuracy.get(name, 0.0)) for name in self.levels[self.level].types
        )

    def observe(
        self, loss: float, correct: np.ndarray, types: np.ndarray, norm: float, readable: list[float]
    ) -> None:
        """Takes in what a step reports; `correct` and `types` (B, TEXT)."""
        self.step += 1
        self.loss += 0.05 * (loss - self.loss)
        self.norm = norm
        self.readable = readable
        for index, name in enumerate(self.types):
            asked = types == index
            if asked.any():
                old = self.accuracy.get(name, 0.0)
                self.accuracy[name] = old + 0.05 * (float(correct[asked].mean()) - old)

    def note(self, event: str) -> None:
        """Prints an event and keeps it for the model card."""
        self.history.append(event)
        print(f"{event} ({self.seconds / 60:.1f} min)", flush=True)

    def advance(self) -> None:
        """Goes to the next level, or into the decay phase, where this one is over."""
        if self.stop:
            return
        level = self.levels[self.level]
        passed = all(self.accuracy.get(name, 0.0) >= bar for name, bar in level.bars.items())
        if not passed and self.step - self.level_start < level.max_steps:
            return
        self.note(f"level {self.level + 1} {'passed' if passed else 'timed out'} at step {self.step}")
        if self.level + 1 < len(self.levels):
            self.level += 1
            self.level_start = self.step
        else:
            self.decay_start = self.step
            decay = max(self.least_decay, math.ceil(self.step * self.decay_share / (1 - self.decay_share)))
            self.stop = self.step + decay

    def __str__(self) -> str:
        answers = " ".join(f"{name}={value:.2f}" for name, value in self.accuracy.items())
        return (
            f"step {self.step}{f'/{self.stop}' if self.stop else ''} level {self.level + 1} "
            f"loss {self.loss:.3f} lr x{self.lr_factor():.2f} norm {self.norm:.0f} "
            f"row {self.readable[2]:.2f} column {self.readable[3]:.2f} | {answers} | "
            f"{self.seconds / 60:.1f} min"
        )
