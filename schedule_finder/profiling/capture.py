"""Step 2: attention of the text queries to the vision tokens of each sample, layer by layer.

Computed from queries and keys beside the model's own attention kernel: only the rows of the text queries are
computed, reduced at once to one number per key, and copied to the host once per batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pruning_runtime import UnsupportedBackbone
from pruning_runtime.attention_rows import (
    attention_rows_and_logits,
    chunk_bytes_on,
    find_text_queries,
    padded_indices,
)
from pruning_runtime.attention_tap import AttentionInputs, attention_tap
from pruning_runtime.backbone import Backbone
from pruning_runtime.scorers.text_guided import importance_from_sums, weighted_rows
from schedule_finder.errors import ProfileError
from schedule_finder.profiling.drawn_queries import draw_queries
from schedule_finder.profiling.fields import CURVE_FIELDS, SCORE_FIELDS, ProfileRow

__all__ = ["CURVE_FIELDS", "SCORE_FIELDS", "ProfileError", "ProfileRow", "layers_to_profile", "profile_batch"]


def layers_to_profile(backbone: Backbone) -> tuple[list[int], dict[int, str]]:
    """Decoder layers with a profile, in order, and the reason for each of the others.

    Layers that use another layer's keys are left out: no stage can score tokens there, and a decoder may compute
    them for the last token alone.

    Raises:
        UnsupportedBackbone: no layer has attention with keys of its own.
    """
    layers: list[int] = []
    left_out: dict[int, str] = {}
    for layer, kind in enumerate(backbone.layer_kinds):
        if backbone.has_own_attention(layer):
            layers.append(layer)
        elif backbone.attends(layer):
            left_out[layer] = f"uses the keys of layer {backbone.kv_sources[layer]}"
        else:
            left_out[layer] = f"{kind}: no attention weights"
    if not layers:
        raise UnsupportedBackbone(
            f"{backbone.name}: none of the {len(backbone.layer_kinds)} decoder layers has attention with keys of "
            "its own; there is nothing to profile"
        )
    return layers, left_out


def profile_batch(
    backbone: Backbone, inputs: dict[str, Tensor], most_queries: int | None = None
) -> list[ProfileRow]:
    """Run one batch through the backbone and return a row per sample.

    Args:
        backbone: the model runs with its own attention kernel and no cache.
        inputs: output of the processor with ``input_ids`` ``[batch, length]``, on the host: the tokens are
            counted there, so that the device is not waited for.
        most_queries: text queries of a sample whose attention is computed; of longer texts a sample of them, see
            `draw_queries`. None: all.

    Raises:
        ProfileError: a sample has no vision tokens, or no text after them.
        UnsupportedBackbone: a layer that should have attention does not compute it for the whole prompt.
    """
    vision = backbone.vision_mask(inputs["input_ids"])
    valid = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(vision)
    vision = vision & valid
    text_queries = find_text_queries(vision, valid)
    num_vision, num_text_queries = vision.sum(1).tolist(), text_queries.sum(1).tolist()
    drawn = text_queries if most_queries is None else draw_queries(text_queries, most_queries)
    num_other = (valid.sum(1) - vision.sum(1)).tolist()
    if min(num_vision) == 0:
        raise ProfileError(f"sample {num_vision.index(0)} of the batch has no vision tokens")
    if min(num_text_queries) == 0:
        raise ProfileError(f"sample {num_text_queries.index(0)} of the batch has no text after its image")

    # Layers that accelerate keeps on the host or on disk have no parameters here until they run.
    devices = (parameter.device for parameter in backbone.text_model.parameters())
    device = next((device for device in devices if device.type != "meta"), torch.device("cpu"))
    layers, _ = layers_to_profile(backbone)
    most = max(num_text_queries) if most_queries is None else min(most_queries, max(num_text_queries))
    reducer = _BatchReducer(layers, vision.to(device), text_queries.to(device), drawn.to(device), most)
    on_device = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
    with torch.inference_mode(), attention_tap(backbone, reducer.on_attention):
        # No logits are needed; one row of them is the fewest that every model accepts.
        backbone.model(**on_device, use_cache=False, logits_to_keep=1)
    scores, curves = reducer.to_host(max(num_vision))
    return [
        ProfileRow(
            num_vision=count,
            num_text_queries=num_text_queries[row],
            num_other=num_other[row],
            scores={name: scores[field, :, row, -count:] for field, name in enumerate(SCORE_FIELDS)},
            curves={name: curves[field, :, row] for field, name in enumerate(CURVE_FIELDS)},
        )
        for row, count in enumerate(num_vision)
    ]


@dataclass(frozen=True)
class _TextQueries:
    """Text queries and vision tokens of some samples, as tensors on one device.

    Attributes:
        rows, real: positions of the drawn queries and which of them are not padding, ``[samples, width]``; see
            `padded_indices`.
        vision_and_text: 1 at vision tokens, and 1 at text queries, float32 ``[samples, 1, 2, length]``, so that
            one product sums attention over both.
        count: drawn queries, float32 ``[samples]``.
        total: text queries, float32 ``[samples]``.
    """

    rows: Tensor
    real: Tensor
    vision_and_text: Tensor
    count: Tensor
    total: Tensor

    def part(self, samples: slice, device: torch.device) -> _TextQueries:
        """Some of the samples, on ``device``."""
        tensors = (self.rows, self.real, self.vision_and_text, self.count, self.total)
        return _TextQueries(*(tensor[samples].to(device) for tensor in tensors))


class _BatchReducer:
    """Reduces attention rows to scores and curves, layer by layer; they stay on the device until `to_host`."""

    def __init__(
        self, layers: list[int], vision: Tensor, text_queries: Tensor, drawn: Tensor, width: int
    ) -> None:
        self._layers = layers
        self._vision = vision
        rows, real = padded_indices(drawn, width)
        kinds = torch.stack([vision, text_queries], 1).float()
        counts = drawn.sum(1).float(), text_queries.sum(1).float()
        self._queries = _TextQueries(rows, real, kinds[:, None], *counts)
        self._results: dict[int, tuple[Tensor, Tensor]] = {}

    def on_attention(self, call: AttentionInputs) -> None:
        """Listener of the attention tap."""
        if call.layer not in self._layers:
            return
        (batch, length), device = self._vision.shape, call.query.device
        if call.query.shape[2] != length:
            raise UnsupportedBackbone(
                f"decoder layer {call.layer} computes {call.query.shape[2]} of {length} positions of a prompt; its "
                "attention cannot be profiled"
            )
        per_sample = 4 * length * self._queries.rows.shape[1]
        at_once = min(batch, max(1, chunk_bytes_on(device) // per_sample))
        chunks = [slice(first, first + at_once) for first in range(0, batch, at_once)]
        parts = [_reduce(call, chunk, self._queries.part(chunk, device)) for chunk in chunks]
        # The layers of a model may be on several devices; the results are collected on the first.
        scores, curves = (
            torch.cat(tensors, 1).to(self._vision.device) for tensors in zip(*parts, strict=True)
        )
        self._results[call.layer] = scores, curves

    def to_host(self, most_vision: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores ``[fields, layers, batch, most_vision]`` (padding first) and curves ``[fields, layers, batch]``.

        One copy for both. Raises `UnsupportedBackbone` where a layer has not called its attention.
        """
        if missing := [layer for layer in self._layers if layer not in self._results]:
            raise UnsupportedBackbone(
                f"decoder layers {', '.join(map(str, missing))} ran without the attention interface of "
                "transformers; they cannot be profiled"
            )
        columns, _ = padded_indices(self._vision, most_vision)
        scores = torch.stack([self._results[layer][0] for layer in self._layers], 1)
        scores = scores.gather(3, columns.expand(*scores.shape[:2], -1, -1))
        curves = torch.stack([self._results[layer][1] for layer in self._layers], 1)
        packed = torch.cat([scores.flatten(), curves.flatten()]).cpu().numpy()
        return (
            packed[: scores.numel()].reshape(scores.shape),
            packed[scores.numel() :].reshape(curves.shape),
        )


def _reduce(call: AttentionInputs, samples: slice, queries: _TextQueries) -> tuple[Tensor, Tensor]:
    """Scores ``[fields, samples, length]`` and curves ``[fields, samples]`` of one layer and some samples."""
    rows, real, kinds = queries.rows, queries.real, queries.vision_and_text
    mask = call.mask if call.mask is None or call.mask.shape[0] == 1 else call.mask[samples]
    others = ((queries.total - 1) / (queries.count - 1).clamp(min=1)).clamp(min=1)[:, None, None]
    scores = kinds.new_zeros(len(SCORE_FIELDS), len(rows), kinds.shape[3])
    entropies = kinds.new_zeros(len(rows))
    blocks = attention_rows_and_logits(
        call.query[samples],
        call.key[samples],
        rows,
        real,
        mask,
        call.scaling,
        call.softcap,
        call.sliding_window,
        chunk_bytes_on(call.query.device),
    )
    for logits, block in blocks:
        mass, given = (kinds @ block.transpose(2, 3)).unbind(2)
        received = block.sum(2)
        weights = importance_from_sums(block, received, given, rows, real)
        # A query receives attention from all others, of which the drawn ones are a sample; what it gives is known.
        weights = others * weights + (1 - others) * given
        scores[0] += received.sum(1)
        scores[1] += weighted_rows(block, weights)
        scores[2] += block[:, :, -1].sum(1)  # the last index holds each sample's last text query
        # Entropy of a / m over the vision tokens, m their sum. With z the logits, log(a) = z - max z + log(max a):
        # one logarithm per row instead of one per key.
        mass = mass.clamp(min=torch.finfo(torch.float32).tiny)
        largest = logits.amax(-1)
        mean = (kinds[:, :, :1] @ logits.mul_(block).transpose(2, 3)).squeeze(2) / mass
        entropy = mass.log() - mean + largest - block.amax(-1).log()
        entropies += entropy.masked_fill(~real[:, None], 0.0).sum((1, 2))
    per_text_query = call.query.shape[1] * queries.count
    scores[0] /= per_text_query[:, None]
    scores[1] *= (queries.total / queries.count)[:, None]  # a sum over text queries
    vision_mass = (scores[0] * kinds[:, 0, 0]).sum(1)
    return scores, torch.stack([vision_mass, entropies / per_text_query / np.log(2.0)])
