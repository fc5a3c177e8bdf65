"""Step 2: what the raters of each sample look at, layer by layer.

Taken from q and k beside the model's own attention kernel: only the raters' rows are computed, reduced
at once to one number per key, and moved to the host once per batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pruning_runtime.attention_rows import attention_rows, find_raters, index_raters
from pruning_runtime.attention_tap import AttentionInputs, attention_tap
from pruning_runtime.backbone import Backbone
from pruning_runtime.scorers.text_guided import text_importance

SCORE_FIELDS = ("uniform_text", "text_guided", "last_token")
"""One number per layer and vision token; the scorer of the same name ranks tokens by it."""

CURVE_FIELDS = (
    "vision_mass",
    "text_mass",
    "other_mass",
    "vision_entropy",
    "importance_entropy",
    "importance_max",
    "importance_last",
)
"""One number per layer; see `ProfileRow`."""


@dataclass(frozen=True)
class ProfileRow:
    """One sample's profile.

    Attributes:
        num_vision: vision tokens.
        num_raters: raters.
        num_other: valid tokens that are not vision tokens.
        scores: `SCORE_FIELDS` to float32 ``[layers, num_vision]``. ``uniform_text`` is the map rater ->
            vision token, attention averaged over heads and raters; ``text_guided`` and ``last_token``
            are those scorers' sums over heads.
        curves: `CURVE_FIELDS` to float32 ``[layers]``. Masses are shares of the raters' attention on
            vision tokens, on raters, and on the rest; they sum to 1. ``vision_entropy`` is the mean
            entropy in bits of a rater's attention within the vision tokens. ``importance_*`` describe
            the text-importance weights summed over heads and normalised over raters: their entropy in
            bits, the largest share, the last rater's share.
    """

    num_vision: int
    num_raters: int
    num_other: int
    scores: dict[str, np.ndarray]
    curves: dict[str, np.ndarray]


class ProfileError(ValueError):
    """A sample that cannot be profiled; the message says why."""


def profile_batch(backbone: Backbone, inputs: dict[str, Tensor]) -> list[ProfileRow]:
    """Run one batch through the backbone and return a row per sample.

    Args:
        backbone: where to listen; its model runs with its own kernel and no cache.
        inputs: what the processor returned, ``input_ids`` among them, on the host: lengths are counted
            there, so that the device is not waited for.

    Raises:
        ProfileError: a sample has no vision tokens, or no text after them.
    """
    vision = backbone.vision_mask(inputs["input_ids"])
    valid = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(vision)
    vision = vision & valid
    raters = find_raters(vision, valid)
    num_vision, num_raters = vision.sum(1).tolist(), raters.sum(1).tolist()
    num_other = (valid.sum(1) - vision.sum(1)).tolist()
    if min(num_vision) == 0:
        raise ProfileError(f"sample {num_vision.index(0)} of the batch has no vision tokens")
    if min(num_raters) == 0:
        raise ProfileError(f"sample {num_raters.index(0)} of the batch has no text after its image")

    # Layers that accelerate keeps elsewhere have no parameters here until they run.
    devices = (parameter.device for parameter in backbone.text_model.parameters())
    device = next((place for place in devices if place.type != "meta"), torch.device("cpu"))
    probe = _Probe(vision.to(device), raters.to(device), max(num_raters))
    on_device = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
    with torch.inference_mode(), attention_tap(backbone, probe.on_attention):
        # No logits are needed; one row of them is the least a model can be asked for.
        backbone.model(**on_device, use_cache=False, logits_to_keep=1)
    scores, curves = probe.to_host(max(num_vision))
    return [
        ProfileRow(
            num_vision=count,
            num_raters=num_raters[row],
            num_other=num_other[row],
            scores={name: scores[place, :, row, -count:] for place, name in enumerate(SCORE_FIELDS)},
            curves={name: curves[place, :, row] for place, name in enumerate(CURVE_FIELDS)},
        )
        for row, count in enumerate(num_vision)
    ]


class _Probe:
    """Reduces each layer's rater rows as they come; everything stays on the device until `to_host`."""

    def __init__(self, vision: Tensor, raters: Tensor, num_raters: int) -> None:
        self._vision = vision
        self._rows, self._real = index_raters(raters, num_raters)
        self._count = raters.sum(1).float()
        # Keys by kind, to sum a row's attention over each kind with one product.
        self._kinds = torch.stack([vision, raters, ~(vision | raters)], -1).float()
        self._scores: list[Tensor] = []
        self._curves: list[Tensor] = []
        self.layers: list[int] = []

    def on_attention(self, call: AttentionInputs) -> None:
        batch, length = self._vision.shape
        if call.query.shape[2] != length:
            raise ProfileError(f"layer {call.layer} sees {call.query.shape[2]} of {length} positions")
        heads = call.query.shape[1]
        scores = self._kinds.new_zeros(len(SCORE_FIELDS), batch, length)
        importance = self._kinds.new_zeros(self._rows.shape)
        sums = self._kinds.new_zeros(4, batch)
        blocks = attention_rows(
            call.query,
            call.key,
            self._rows,
            self._real,
            call.mask,
            call.scaling,
            softcap=call.softcap,
            sliding_window=call.sliding_window,
        )
        for block in blocks:
            weights = text_importance(block, self._rows, self._real)
            importance += weights.sum(1)
            scores[0] += block.sum((1, 2))
            scores[1] += (weights[..., None, :] @ block).squeeze(-2).sum(1)
            scores[2] += block[:, :, -1].sum(1)  # the last place holds each sample's last rater
            masses = block @ self._kinds[:, None]
            sums[:3] += masses.sum((1, 2)).T
            # Entropy of a / m over vision tokens, from the entropy of a: sum(entr(a)) / m + log(m).
            mass = masses[..., 0].clamp(min=torch.finfo(torch.float32).tiny)
            entropy = (torch.special.entr(block) @ self._kinds[:, None, :, :1]).squeeze(
                -1
            ) / mass + mass.log()
            sums[3] += entropy.masked_fill(~self._real[:, None], 0.0).sum((1, 2))
        per_rater = heads * self._count
        scores[0] /= per_rater[:, None]
        sums /= per_rater
        sums[3] /= torch.log(torch.tensor(2.0))
        share = importance / importance.sum(1, keepdim=True)
        summary = torch.stack([torch.special.entr(share).sum(1) / np.log(2.0), share.amax(1), share[:, -1]])
        self._scores.append(scores)
        self._curves.append(torch.cat([sums, summary]))
        self.layers.append(call.layer)

    def to_host(self, most_vision: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores ``[fields, layers, batch, most_vision]`` (fillers first) and curves, in one transfer."""
        columns, _ = index_raters(self._vision, most_vision)
        scores = torch.stack(self._scores, 1)
        scores = scores.gather(3, columns.expand(*scores.shape[:2], -1, -1))
        curves = torch.stack(self._curves, 1)
        packed = torch.cat([scores.flatten(), curves.flatten()]).cpu().numpy()
        return (
            packed[: scores.numel()].reshape(scores.shape),
            packed[scores.numel() :].reshape(curves.shape),
        )
