"""VidCom2's rule: tokens unlike the mean of their video and of their frame, more of them in distinctive frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning_runtime.scorers.base import VisionTokens
from pruning_runtime.scorers.frames import FrameScorer
from pruning_runtime.scorers.similarity import unit_rows

if TYPE_CHECKING:
    from torch import Tensor

_WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
_TEMPERATURE = 0.01


class VidCom2(FrameScorer):
    """Video compression commander (VidCom2, arXiv 2505.14454); reads no text.

    Only the half of the channels that varies least over the video counts. A token's similarity to the video's mean and
    to its frame's mean is a sum of Gaussians. Frames that are on average less similar to the video get a larger quota,
    which their least similar tokens fill. Where the quotas do not sum to the number that is kept, the most similar
    tokens among them leave, or the least similar others join.
    """

    name = "vidcom2"

    def score(self, tokens: VisionTokens) -> Tensor:
        import torch

        features, real = tokens.features, tokens.is_token
        slots = real.shape[1]
        count = real.sum(1, keepdim=True).clamp(min=1)
        length = self.frame_length(tokens)
        frame = (torch.arange(slots, device=real.device) // length).clamp(max=slots - 1)  # [groups, slots]
        directions = unit_rows(features * _steady_channels(features, real, count)) * real[..., None]

        column = frame[..., None].expand_as(directions)
        centres = torch.zeros_like(directions).scatter_add_(1, column, directions) / length[..., None]
        to_video = _similarity(directions, directions.sum(1, keepdim=True) / count[..., None])
        total = to_video + _similarity(directions, centres.gather(1, column))

        # By frame, and in a frame from the least similar token on; padding is last in both.
        by_total = total.masked_fill(~real, float("inf")).argsort(dim=1, stable=True)
        in_frames = by_total.gather(1, frame.gather(1, by_total).argsort(dim=1, stable=True))
        rank = in_frames.argsort(1) - frame * length
        means = torch.zeros_like(to_video).scatter_add_(1, frame, to_video * real) / length
        quota = _quotas(means, count // length, length, tokens.keep[:, None] / count)
        chosen = real & (rank < quota.gather(1, frame))
        return chosen.float() * slots - by_total.argsort(1)

    @classmethod
    def flops(cls, tokens: float, kept: float, width: float, text: float) -> float:
        """Variances over all channels; a norm, two means and two distances over half of them."""
        return 8 * tokens * width


def _steady_channels(features: Tensor, real: Tensor, count: Tensor) -> Tensor:
    """1 at the half of the channels with the lowest variance over the video, else 0, ``[groups, 1, width]``."""
    mean = features.sum(1, keepdim=True) / count[..., None]
    variance = ((features - mean) ** 2 * real[..., None]).sum(1)
    rank = variance.argsort(dim=1, stable=True).argsort(1)
    return (rank < max(features.shape[2] // 2, 1)).to(features.dtype)[:, None]


def _similarity(directions: Tensor, centres: Tensor) -> Tensor:
    """Sum of Gaussians of several widths of the distance to ``centres``, ``[groups, slots]``."""
    squared = ((directions - centres) ** 2).sum(2)
    return sum((-squared / (2 * width)).exp() for width in _WIDTHS)  # type: ignore[return-value]


def _quotas(means: Tensor, frames: Tensor, length: Tensor, ratio: Tensor) -> Tensor:
    """Tokens of each frame before the total is made exact, ``[groups, slots]``; slots from ``frames`` on are no frames.

    Args:
        means: of each frame's similarities to the video, ``[groups, slots]``.
        frames, length: frames of each group and their tokens, ``[groups, 1]``.
        ratio: of the tokens to keep, ``[groups, 1]``.
    """
    import torch

    is_frame = torch.arange(means.shape[1], device=means.device) < frames
    share = (-means / _TEMPERATURE).masked_fill(~is_frame, float("-inf")).softmax(1).nan_to_num(0.0)
    quota = length * (ratio * (1 + share - 1 / frames.clamp(min=1))).clamp(max=1.0)
    return quota.round().clamp(min=1)
