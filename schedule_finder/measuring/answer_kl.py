"""Answer KL: how far pruning moves the distribution of the answer's first token, measured on the model.

No label is needed: the unpruned model's own distribution is the reference. A single stage is measured from the
hidden states that enter its layer, so that only this layer and later ones run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning_runtime import Schedule, pruned
from pruning_runtime.backbone import Backbone
from pruning_runtime.forward_override import replaced_forwards
from pruning_runtime.schedule import BackboneIdentity, Stage
from schedule_finder.measuring.token_policy import TokenPolicy
from schedule_finder.measuring.unit_store import UnitStore, inputs_digest, model_digest
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.samples import Sample

__all__ = ["AnswerKL", "TokenPolicy", "answer_kl"]


@dataclass(frozen=True)
class _Batch:
    """Inputs on the device, their digest, and log-probabilities of the unpruned model's next token ``[rows, vocab]``."""

    inputs: dict[str, Tensor]
    digest: str
    reference: Tensor


def answer_kl(full: Tensor, pruned_model: Tensor) -> Tensor:
    """KL divergence of the pruned model's next-token distribution from the full model's, in nats, ``[rows]``.

    Both arguments are log-probabilities, ``[rows, vocabulary]``. Rounding below zero becomes zero.
    """
    return (full.exp() * (full - pruned_model)).sum(-1).clamp(min=0)


class AnswerKL:
    """Measures schedules on a fixed set of samples; `for_samples` makes one.

    Args:
        backbone: where to measure, with its name for schedules.
        sample_ids: one for each row of ``batches``; all results are in this order.
        batches: model inputs on the model's device, padded on the left.
        store: keeps what was measured; a stored result is not measured again. Its context must identify the model.
    """

    def __init__(
        self,
        backbone: Backbone,
        identity: BackboneIdentity,
        sample_ids: Sequence[str],
        batches: Sequence[dict[str, Tensor]],
        store: UnitStore | None = None,
    ) -> None:
        self.sample_ids = list(sample_ids)
        self.forwards = float(len(self.sample_ids))
        """Cost so far in unpruned forward passes of one sample: layers that ran, weighted by their tokens."""
        self._backbone = backbone
        self._identity = identity
        self._store = store or UnitStore(None, {})
        self._batches = [
            _Batch(inputs, inputs_digest(inputs), self._next_token(inputs)) for inputs in batches
        ]

    @classmethod
    def for_samples(
        cls,
        loaded: LoadedBackbone,
        samples: Sequence[Sample],
        batch_size: int,
        folder: Path | None = None,
    ) -> AnswerKL:
        """An instance on these samples, ``batch_size`` per forward pass, that keeps its results in ``folder``."""
        batches = []
        for first in range(0, len(samples), batch_size):
            inputs = loaded.inputs(list(samples[first : first + batch_size]))
            batches.append({name: value.to(loaded.device) for name, value in inputs.items()})
        store = UnitStore(folder, model_digest(loaded) if folder else {})
        return cls(loaded.backbone, loaded.identity, [sample.id for sample in samples], batches, store)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def measure(self, stages: Sequence[Stage], policy: TokenPolicy, samples: int | None = None) -> np.ndarray:
        """Answer KL in nats of each sample, float32 ``[samples]``: full against pruned next-token distribution.

        ``samples``: use the first ones only, in whole batches.
        """
        return self.measure_with_tokens(stages, policy, samples)[0]

    def measure_with_tokens(
        self, stages: Sequence[Stage], policy: TokenPolicy, samples: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `measure`, and the id of each sample's most likely token, both ``[samples]``."""
        schedule = self._schedule(stages, policy)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in self._batches:
            if samples is not None and sum(len(kl) for kl, _ in found) >= samples:
                break
            found.append(self._measured(batch, schedule))
        return np.concatenate([kl for kl, _ in found]), np.concatenate([token for _, token in found])

    def measure_single(
        self, layers: Sequence[int], ratios: Sequence[float], policy: TokenPolicy
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Every single stage (layer, ratio), layer by layer from the last to the first.

        Yields:
            ``(layer, answer KL)`` with ``[ratios, samples]`` in nats.
        """
        reusable = self._backbone.kv_sources == tuple(range(self._backbone.shape.num_layers))
        states: list[dict[int, Any] | None] = [None] * len(self._batches)
        for layer in sorted(layers, reverse=True):
            rows = []
            for ratio in ratios:
                schedule = self._schedule((Stage(layer=layer, keep_ratio=ratio),), policy)
                found = []
                for index, batch in enumerate(self._batches):
                    if reusable and states[index] is None and not self._is_stored(batch, schedule):
                        states[index] = self._states(batch, layers)
                    reached = states[index] or {}
                    with _starting_at(self._backbone.layers, layer, reached.get(layer - 1)):
                        found.append(
                            self._measured(batch, schedule, since=max(layer, 0) if reached else 0)[0]
                        )
                rows.append(np.concatenate(found))
            yield layer, np.stack(rows)

    def _is_stored(self, batch: _Batch, schedule: Schedule) -> bool:
        return self._store.get(_key(batch, schedule)) is not None

    def _measured(self, batch: _Batch, schedule: Schedule, since: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Answer KL and most likely token of one batch, from the store or from the model."""
        stored = self._store.get(key := _key(batch, schedule))
        if stored is None:
            kl, tokens = self._pruned(batch, schedule, since)
            self._store.put(key, stored := {"kl": kl.tolist(), "tokens": tokens.tolist()})
        return np.array(stored["kl"], dtype=np.float32), np.array(stored["tokens"], dtype=np.int64)

    def _schedule(self, stages: Sequence[Stage], policy: TokenPolicy) -> Schedule:
        return Schedule(
            backbone=self._identity,
            stages=policy.apply(stages),
            scorer=policy.choice,
            dropped_tokens=policy.dropped_tokens,
        )

    def _pruned(self, batch: _Batch, schedule: Schedule, since: int = 0) -> tuple[np.ndarray, np.ndarray]:
        with pruned(self._backbone.model, schedule) as record:
            found = self._next_token(batch.inputs)
        full = [vision + other for vision, other in zip(record.num_vision, record.num_other, strict=True)]
        ran = sum(map(sum, record.tokens_per_layer[since:])) + record.pre_decoder_cost * sum(full)
        self.forwards += ran / (sum(full) * record.num_layers) * len(full)
        return answer_kl(batch.reference, found).cpu().numpy(), found.argmax(-1).cpu().numpy()

    def _next_token(self, inputs: dict[str, Tensor]) -> Tensor:
        model: Any = self._backbone.model
        with torch.inference_mode():
            output = model(**inputs, use_cache=False, logits_to_keep=1)
        return output.logits[:, -1].float().log_softmax(-1)

    def _states(self, batch: _Batch, layers: Sequence[int]) -> dict[int, Any]:
        """What the layers before each of ``layers`` return on the unpruned prompt."""
        states: dict[int, Any] = {}

        def remembering(index: int, own: Callable[..., Any]) -> Callable[..., Any]:
            # The state before any hook of the layer changes it.
            def forward(*args: Any, **kwargs: Any) -> Any:
                states[index] = own(*args, **kwargs)
                return states[index]

            return forward

        with replaced_forwards(self._backbone.layers, remembering):
            self._next_token(batch.inputs)
        self.forwards += len(batch.reference)
        return {layer - 1: states[layer - 1] for layer in layers if layer > 0}


def _key(batch: _Batch, schedule: Schedule) -> dict[str, Any]:
    """Identity of one batch under one schedule; the model is in the store's context."""
    fields = {"stages", "scorer", "dropped_tokens", "positions", "image_newlines"}
    return {"inputs": batch.digest, "schedule": schedule.model_dump(mode="json", include=fields)}


@contextmanager
def _starting_at(blocks: nn.ModuleList, layer: int, state: Any) -> Iterator[None]:
    """Let all layers before ``layer`` return ``state`` at once; None: run them."""
    if state is None:
        yield
        return
    with replaced_forwards(blocks[:layer], lambda _index, _own: lambda *_args, **_kwargs: state):
        yield
