"""How far pruning moves the answer: measured on the model, as KL divergence of the answer's first token.

No label is needed: the unpruned model's own distribution is the reference. A stage is measured from the
hidden states that reach its layer, so that only that layer and those behind it run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning_runtime import Schedule, pruned
from pruning_runtime.backbone import Backbone
from pruning_runtime.forward_override import replaced_forwards
from pruning_runtime.schedule import BackboneIdentity, DroppedTokens, ScorerChoice, Stage
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.samples import Sample


@dataclass(frozen=True)
class _Batch:
    """Inputs on the device, and the log-probabilities of the unpruned model's next token, ``[rows, vocabulary]``."""

    inputs: dict[str, Tensor]
    reference: Tensor


@dataclass(frozen=True)
class TokenPolicy:
    """What a stage does with its tokens: which are kept, and what the others leave behind."""

    scorer: str
    dropped_tokens: DroppedTokens = "discard"
    seed: int | None = None
    """Of the scorer ``random``."""

    @property
    def choice(self) -> ScorerChoice:
        """The scorer as a schedule says it."""
        return ScorerChoice(name=self.scorer, options={} if self.seed is None else {"seed": self.seed})

    def __str__(self) -> str:
        return self.scorer if self.dropped_tokens == "discard" else f"{self.scorer}, {self.dropped_tokens}"


class AnswerKL:
    """Measures schedules on a fixed set of samples; `for_samples` makes one.

    Args:
        backbone: where to measure, with its name for schedules.
        sample_ids: one for each row of ``batches``; all results are in this order.
        batches: model inputs on the model's device, padded on the left.
    """

    def __init__(
        self,
        backbone: Backbone,
        identity: BackboneIdentity,
        sample_ids: Sequence[str],
        batches: Sequence[dict[str, Tensor]],
    ) -> None:
        self.sample_ids = list(sample_ids)
        self.forwards = float(len(self.sample_ids))
        """Cost so far in unpruned forward passes of one sample: layers that ran, weighted by their tokens."""
        self._backbone = backbone
        self._identity = identity
        self._batches = [_Batch(inputs, self._next_token(inputs)) for inputs in batches]

    @classmethod
    def for_samples(cls, loaded: LoadedBackbone, samples: Sequence[Sample], batch_size: int) -> AnswerKL:
        """A meter on these samples, ``batch_size`` of them per forward pass."""
        batches = []
        for first in range(0, len(samples), batch_size):
            inputs = loaded.inputs(list(samples[first : first + batch_size]))
            batches.append({name: value.to(loaded.device) for name, value in inputs.items()})
        return cls(loaded.backbone, loaded.identity, [sample.id for sample in samples], batches)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def measure(self, stages: Sequence[Stage], rule: TokenPolicy, samples: int | None = None) -> np.ndarray:
        """KL divergence in nats of each sample's answer token, full against pruned, ``[samples]``.

        ``samples``: look at the first ones only, in whole batches.
        """
        return self.look(stages, rule, samples)[0]

    def look(
        self, stages: Sequence[Stage], rule: TokenPolicy, samples: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `measure`, and the id of each sample's most likely token, both ``[samples]``."""
        schedule = self._schedule(stages, rule)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in self._batches:
            if samples is not None and sum(len(kl) for kl, _ in found) >= samples:
                break
            found.append(self._pruned(batch, schedule))
        return np.concatenate([kl for kl, _ in found]), np.concatenate([token for _, token in found])

    def measure_single(
        self, layers: Sequence[int], ratios: Sequence[float], rule: TokenPolicy
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Every single stage (layer, ratio), layer by layer from the last to the first.

        Yields:
            ``(layer, divergences)`` with ``[ratios, samples]`` in nats.
        """
        reusable = self._backbone.kv_sources == tuple(range(self._backbone.shape.num_layers))
        states = [self._states(batch, layers) if reusable else {} for batch in self._batches]
        for layer in sorted(layers, reverse=True):
            rows = []
            for ratio in ratios:
                schedule = self._schedule((Stage(layer=layer, keep_ratio=ratio),), rule)
                found = []
                for batch, reached in zip(self._batches, states, strict=True):
                    with _starting_at(self._backbone.layers, layer, reached.get(layer - 1)):
                        found.append(self._pruned(batch, schedule, since=max(layer, 0) if reached else 0)[0])
                rows.append(np.concatenate(found))
            yield layer, np.stack(rows)

    def _schedule(self, stages: Sequence[Stage], rule: TokenPolicy) -> Schedule:
        return Schedule(
            backbone=self._identity,
            stages=tuple(stages),
            scorer=rule.choice,
            dropped_tokens=rule.dropped_tokens,
        )

    def _pruned(self, batch: _Batch, schedule: Schedule, since: int = 0) -> tuple[np.ndarray, np.ndarray]:
        with pruned(self._backbone.model, schedule) as record:
            found = self._next_token(batch.inputs)
        full = [vision + other for vision, other in zip(record.num_vision, record.num_other, strict=True)]
        ran = sum(map(sum, record.tokens_per_layer[since:])) + record.pre_decoder_cost * sum(full)
        self.forwards += ran / (sum(full) * record.num_layers) * len(full)
        divergence = (batch.reference.exp() * (batch.reference - found)).sum(-1).clamp(min=0)
        return divergence.cpu().numpy(), found.argmax(-1).cpu().numpy()

    def _next_token(self, inputs: dict[str, Tensor]) -> Tensor:
        model: Any = self._backbone.model
        with torch.inference_mode():
            output = model(**inputs, use_cache=False, logits_to_keep=1)
        return output.logits[:, -1].float().log_softmax(-1)

    def _states(self, batch: _Batch, layers: Sequence[int]) -> dict[int, Any]:
        """What the layers before each of ``layers`` return on the unpruned prompt."""
        states: dict[int, Any] = {}
        blocks = self._backbone.layers
        with replaced_forwards(blocks, lambda place, own: _Remember(place, own, states)):
            self._next_token(batch.inputs)
        self.forwards += len(batch.reference)
        return {layer - 1: states[layer - 1] for layer in layers if layer > 0}


class _Remember:
    """A layer's `forward` that keeps what it returned, before any hook of the layer changes it."""

    def __init__(self, place: int, own: Any, states: dict[int, Any]) -> None:
        self._place, self._own, self._states = place, own, states

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._own(*args, **kwargs)
        self._states[self._place] = output
        return output


@contextmanager
def _starting_at(blocks: nn.ModuleList, layer: int, state: Any) -> Iterator[None]:
    """Let all layers before ``layer`` return ``state`` at once; None: run them."""
    if state is None:
        yield
        return
    with replaced_forwards(blocks[:layer], lambda _place, _own: lambda *_args, **_kwargs: state):
        yield
