"""What a measurement depends on besides the stages: scorers, dropped tokens, answer length. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pruning_runtime.schedule import DroppedTokens, ScorerChoice, Stage

CONTROLS = ("strided", "random")
"""Scorers that read nothing. A schedule that is not better than with them is useless, so they are always measured."""

NOT_MERGED_SUFFIX = ", not merged"
"""End of the name of a baseline whose dropped tokens are discarded where the schedule's are merged."""

ANSWER_TOKENS = 16
"""Tokens of the unpruned model's answer that answer KL is averaged over, at most."""


@dataclass(frozen=True)
class TokenPolicy:
    """What stages do with their tokens: which are kept, and whether the others are discarded or merged.

    Attributes:
        scorer: of all stages; ``pre_decoder`` replaces it before the decoder.
        dropped_tokens: as in a schedule.
        seed: of the scorer ``random``.
        pre_decoder: scorer of a stage before the decoder; None: ``scorer``.
    """

    scorer: str
    dropped_tokens: DroppedTokens = "discard"
    seed: int | None = None
    pre_decoder: str | None = None

    @property
    def choice(self) -> ScorerChoice:
        """The scorer as a schedule's field."""
        return ScorerChoice(name=self.scorer, options={} if self.seed is None else {"seed": self.seed})

    @property
    def before_decoder(self) -> str:
        """Name of the scorer of a stage before the decoder."""
        return self.pre_decoder or self.scorer

    def apply(self, stages: Sequence[Stage]) -> tuple[Stage, ...]:
        """The stages, with a scorer of its own before the decoder where it differs. Applying twice changes nothing."""
        own = None if self.before_decoder == self.scorer else ScorerChoice(name=self.before_decoder)
        return tuple(
            stage if stage.layer >= 0 else stage.model_copy(update={"scorer": own}) for stage in stages
        )

    def used_by(self, stages: Sequence[Stage]) -> TokenPolicy:
        """The policy without what ``stages`` do not use: a stage that keeps nothing has nothing to score."""
        has_first = any(stage.layer < 0 for stage in stages)
        inside = any(stage.layer >= 0 and stage.keep_ratio > 0 for stage in stages)
        if not has_first:
            return TokenPolicy(self.scorer, self.dropped_tokens, self.seed)
        if not inside:
            seed = self.seed if self.before_decoder == self.scorer else None
            return TokenPolicy(self.before_decoder, self.dropped_tokens, seed)
        return self

    def __str__(self) -> str:
        parts = [] if self.before_decoder == self.scorer else [f"{self.before_decoder} before the decoder"]
        parts.append(self.scorer)
        parts += [] if self.dropped_tokens == "discard" else [self.dropped_tokens]
        return ", ".join(parts)


PAPER_POLICY = TokenPolicy("text_guided")
"""The rule of the paper that this project follows (arXiv 2508.06084)."""
