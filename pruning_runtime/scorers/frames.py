"""Base class of the rules that compare the frames of a video."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pruning_runtime.scorers.base import FeatureScorer, VisionTokens

if TYPE_CHECKING:
    from torch import Tensor


class FrameScorer(FeatureScorer):
    """Scores vision tokens by the frames of a video. Frames must be whole, so only a schedule's first stage can use it.

    ``frame_tokens`` are the tokens of a frame, for models whose videos are one run of vision tokens (Qwen2.5-VL,
    LLaVA-OneVision): every run is then a video, and keeps its share. None: every run is a frame, and all runs of a
    sample are one video (Qwen3-VL, InternVL). Frames of a video must be of equal size; prompts where they are not are
    refused.
    """

    fewest_frames: ClassVar[int] = 1
    """Videos of fewer frames are refused."""

    def __init__(self, frame_tokens: int | None = None) -> None:
        if frame_tokens is not None and (type(frame_tokens) is not int or frame_tokens < 1):
            raise TypeError(f"frame_tokens must be a whole number of tokens above 0, found {frame_tokens!r}")
        super().__init__("sample" if frame_tokens is None else "image")
        self.frame_tokens = frame_tokens

    def frame_length(self, tokens: VisionTokens) -> Tensor:
        """Tokens of a frame of each group, long ``[groups, 1]``."""
        count = tokens.is_token.sum(1, keepdim=True)
        if self.frame_tokens is not None:
            return count.clamp(min=self.frame_tokens, max=self.frame_tokens)
        assert tokens.images is not None
        return (count // tokens.images[:, None].clamp(min=1)).clamp(min=1)
