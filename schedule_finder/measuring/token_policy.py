"""Scorer and dropped-token setting of a measurement. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from pruning_runtime.schedule import DroppedTokens, ScorerChoice


@dataclass(frozen=True)
class TokenPolicy:
    """What a stage does with its tokens: which are kept, and whether the others are discarded or merged."""

    scorer: str
    dropped_tokens: DroppedTokens = "discard"
    seed: int | None = None
    """Of the scorer ``random``."""

    @property
    def choice(self) -> ScorerChoice:
        """The scorer as a schedule's field."""
        return ScorerChoice(name=self.scorer, options={} if self.seed is None else {"seed": self.seed})

    def __str__(self) -> str:
        return self.scorer if self.dropped_tokens == "discard" else f"{self.scorer}, {self.dropped_tokens}"
