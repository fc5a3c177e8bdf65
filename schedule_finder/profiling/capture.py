"""Step 2: what the text queries of each sample look at, layer by layer.

Taken from q and k beside the model's own attention kernel: only the text queries' rows are computed, reduced
at once to one number per key, and moved to the host once per batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pruning_runtime.attention_rows import (
    attention_rows_and_logits,
    chunk_bytes_on,
    find_text_queries,
    padded_indices,
)
from pruning_runtime.attention_tap import AttentionInputs, attention_tap
from pruning_runtime.backbone import Backbone
from pruning_runtime.scorers.text_guided import importance_from_sums, weighted_rows

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
        num_text_queries: text queries.
        num_other: valid tokens that are not vision tokens.
        scores: `SCORE_FIELDS` to float32 ``[layers, num_vision]``. ``uniform_text`` is the map text query ->
            vision token, attention averaged over heads and text queries; ``text_guided`` and ``last_token``
            are those scorers' sums over heads.
        curves: `CURVE_FIELDS` to float32 ``[layers]``. Masses are shares of the text queries' attention on
            vision tokens, on text queries, and on the rest; they sum to 1. ``vision_entropy`` is the mean
            entropy in bits of a text query's attention within the vision tokens. ``importance_*`` describe
            the text-importance weights summed over heads and normalised over text_queries: their entropy in
            bits, the largest share, the last text query's share.
    """

    num_vision: int
    num_text_queries: int
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
    text_queries = find_text_queries(vision, valid)
    num_vision, num_text_queries = vision.sum(1).tolist(), text_queries.sum(1).tolist()
    num_other = (valid.sum(1) - vision.sum(1)).tolist()
    if min(num_vision) == 0:
        raise ProfileError(f"sample {num_vision.index(0)} of the batch has no vision tokens")
    if min(num_text_queries) == 0:
        raise ProfileError(f"sample {num_text_queries.index(0)} of the batch has no text after its image")

    # Layers that accelerate keeps elsewhere have no parameters here until they run.
    devices = (parameter.device for parameter in backbone.text_model.parameters())
    device = next((place for place in devices if place.type != "meta"), torch.device("cpu"))
    probe = _Probe(vision.to(device), text_queries.to(device), max(num_text_queries))
    on_device = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
    with torch.inference_mode(), attention_tap(backbone, probe.on_attention):
        # No logits are needed; one row of them is the least a model can be asked for.
        backbone.model(**on_device, use_cache=False, logits_to_keep=1)
    scores, curves = probe.to_host(max(num_vision))
    return [
        ProfileRow(
            num_vision=count,
            num_text_queries=num_text_queries[row],
            num_other=num_other[row],
            scores={name: scores[place, :, row, -count:] for place, name in enumerate(SCORE_FIELDS)},
            curves={name: curves[place, :, row] for place, name in enumerate(CURVE_FIELDS)},
        )
        for row, count in enumerate(num_vision)
    ]


class _Probe:
    """Reduces each layer's text query rows as they come; everything stays on the device until `to_host`."""

    def __init__(self, vision: Tensor, text_queries: Tensor, num_text_queries: int) -> None:
        self._vision = vision
        rows, real = padded_indices(text_queries, num_text_queries)
        # Keys by kind, to sum attention over each kind with one product.
        kinds = torch.stack([vision, text_queries, ~(vision | text_queries)], 1).float()
        self._tables = (rows, real, kinds, text_queries.sum(1).float())
        self._scores: list[Tensor] = []
        self._curves: list[Tensor] = []
        self.layers: list[int] = []

    def on_attention(self, call: AttentionInputs) -> None:
        batch, length = self._vision.shape
        if call.query.shape[2] != length:
            raise ProfileError(f"layer {call.layer} sees {call.query.shape[2]} of {length} positions")
        # A model may be spread over devices; its layers' results meet on the first.
        tables = [table.to(call.query.device) for table in self._tables]
        together = min(batch, max(1, chunk_bytes_on(call.query.device) // (4 * length * tables[0].shape[1])))
        parts = [
            _reduce(
                call, slice(first, first + together), *(table[first : first + together] for table in tables)
            )
            for first in range(0, batch, together)
        ]
        self._scores.append(torch.cat([scores for scores, _ in parts], 1).to(self._vision.device))
        self._curves.append(torch.cat([curves for _, curves in parts], 1).to(self._vision.device))
        self.layers.append(call.layer)

    def to_host(self, most_vision: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores ``[fields, layers, batch, most_vision]`` (padding first) and curves, in one transfer."""
        columns, _ = padded_indices(self._vision, most_vision)
        scores = torch.stack(self._scores, 1)
        scores = scores.gather(3, columns.expand(*scores.shape[:2], -1, -1))
        curves = torch.stack(self._curves, 1)
        packed = torch.cat([scores.flatten(), curves.flatten()]).cpu().numpy()
        return (
            packed[: scores.numel()].reshape(scores.shape),
            packed[scores.numel() :].reshape(curves.shape),
        )


def _reduce(
    call: AttentionInputs, some: slice, rows: Tensor, real: Tensor, kinds: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """One layer's scores ``[fields, samples, length]`` and curves ``[fields, samples]`` of some samples.

    Args:
        call: the layer's attention.
        some: which samples of its batch; what follows is theirs alone.
        rows, real: as of `padded_indices`.
        kinds: 1 for vision tokens, text queries, the rest: ``[samples, 3, length]``.
        count: text queries, ``[samples]``.
    """
    samples, _, length = kinds.shape
    mask = call.mask if call.mask is None or call.mask.shape[0] == 1 else call.mask[some]
    scores = kinds.new_zeros(len(SCORE_FIELDS), samples, length)
    importance = kinds.new_zeros(rows.shape)
    entropies = kinds.new_zeros(samples)
    kinds_first = kinds[:, None, :2]  # vision tokens and text queries, summed over in one product
    blocks = attention_rows_and_logits(
        call.query[some],
        call.key[some],
        rows,
        real,
        mask,
        call.scaling,
        call.softcap,
        call.sliding_window,
        chunk_bytes_on(call.query.device),
    )
    for logits, block in blocks:
        mass, given = (kinds_first @ block.transpose(2, 3)).unbind(2)
        received = block.sum(2)
        weights = importance_from_sums(block, received, given, rows, real)
        importance += weights.sum(1)
        scores[0] += received.sum(1)
        scores[1] += weighted_rows(block, weights)
        scores[2] += block[:, :, -1].sum(1)  # the last place holds each sample's last text query
        # Entropy of a / m over the vision tokens, m their sum. With z the logits, log(a) = z - max z + log(max a):
        # no logarithm but one for each row is taken.
        mass = mass.clamp(min=torch.finfo(torch.float32).tiny)
        largest = logits.amax(-1)
        mean = (kinds_first[:, :, :1] @ logits.mul_(block).transpose(2, 3)).squeeze(2) / mass
        entropy = mass.log() - mean + largest - block.amax(-1).log()
        entropies += entropy.masked_fill(~real[:, None], 0.0).sum((1, 2))
    per_text_query = call.query.shape[1] * count
    scores[0] /= per_text_query[:, None]
    masses = (kinds @ scores[0][..., None]).squeeze(-1).T
    share = importance / importance.sum(1, keepdim=True)
    bits = torch.stack([entropies / per_text_query, torch.special.entr(share).sum(1)]) / np.log(2.0)
    return scores, torch.cat([masses, bits, torch.stack([share.amax(1), share[:, -1]])])
