"""Answer KL: how far pruning moves the distributions of an answer's tokens, measured on the model.

No label is needed: the reference is the unpruned model, with the answer that it gives itself. With its tokens
``a_1 ... a_n`` (the one that ends it included, at most ``answer_tokens``), ``P`` the unpruned and ``Q`` the pruned model,

    answer KL = 1/n sum over t of KL(P(. | prompt, a_1 ... a_{t-1}) || Q(. | prompt, a_1 ... a_{t-1})).

One forward pass over the prompt and the answer gives all terms (teacher forcing). Schedules that begin alike share
the layers up to where they differ (`SharedStates`), and all share the vision part (`VisionFeatures`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruning_runtime import Schedule, pruned
from pruning_runtime.backbone import Backbone
from pruning_runtime.schedule import BackboneIdentity, Stage
from pruning_runtime.setup import tower_needs
from schedule_finder.measuring.batches import similar_lengths
from schedule_finder.measuring.own_answers import answers_with_logits, with_answers
from schedule_finder.measuring.shared_states import SharedStates
from schedule_finder.measuring.token_policy import ANSWER_TOKENS, TokenPolicy
from schedule_finder.measuring.unit_store import UnitStore, inputs_digest, model_digest
from schedule_finder.measuring.vision_features import VisionFeatures
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.samples import Sample

__all__ = ["AnswerKL", "TokenPolicy", "answer_kl"]

_CHUNK_VALUES = 2**24
"""Logits compared at once. In float32, a dozen long vocabularies would else take more memory than the model's states."""


@dataclass(frozen=True)
class _Batch:
    """Prompts with their answers, ready to compare.

    Attributes:
        inputs: of one pass over prompts and answers, on the device.
        digest: of the inputs.
        lengths: tokens of each row's answer.
        reference: logits of the unpruned model for the answer tokens of all rows in turn, ``[tokens, vocab]``: those
            that chose the answers, or, in half precision, of one pass over prompts and answers. In the model's own
            type, so that nothing is lost, and on the host, where 64 answers of 16 tokens over 150k entries (0.3 GB in
            bfloat16) do not take memory from the model.
    """

    inputs: dict[str, Tensor]
    digest: str
    lengths: tuple[int, ...]
    reference: Tensor

    @property
    def answer_length(self) -> int:
        """Positions behind the prompts."""
        return max(self.lengths) - 1

    def answer_logits(self, logits: Tensor) -> Tensor:
        """Of ``[rows, longest answer, vocab]`` those that predict the rows' answer tokens, ``[tokens, vocab]``."""
        step = torch.arange(logits.shape[1], device=logits.device)
        return logits[step < torch.tensor(self.lengths, device=logits.device)[:, None]]


def answer_kl(full: Tensor, pruned_model: Tensor) -> Tensor:
    """KL divergence of the pruned model's next-token distributions from the full model's, in nats, ``[tokens]``.

    Both arguments are log-probabilities, ``[tokens, vocabulary]``. Rounding below zero becomes zero.
    """
    return (full.exp() * (full - pruned_model)).sum(-1).clamp(min=0)


class AnswerKL:
    """Measures schedules on a fixed set of samples; `for_samples` makes one.

    Args:
        backbone: where to measure, with its name for schedules.
        sample_ids: one for each row of ``batches``; all results are in their order.
        batches: model inputs on the model's device, padded on the left.
        store: keeps what was measured; a stored result is not measured again. Its context must identify the model.
        answer_tokens: longest answer, in tokens; 1: only the distribution of the first token counts.
        order: index into ``sample_ids`` of each row of ``batches``; None: they have the same order.
    """

    def __init__(
        self,
        backbone: Backbone,
        identity: BackboneIdentity,
        sample_ids: Sequence[str],
        batches: Sequence[dict[str, Tensor]],
        store: UnitStore | None = None,
        answer_tokens: int = ANSWER_TOKENS,
        order: Sequence[int] | None = None,
    ) -> None:
        self.sample_ids = list(sample_ids)
        self._order = np.arange(len(sample_ids)) if order is None else np.asarray(order)
        self.answer_tokens = answer_tokens
        self.forwards = 0.0
        """Cost so far in unpruned forward passes of one sample and its answer: layers that ran, weighted by their
        tokens. Generating an answer counts as one of them: it computes as many tokens, but takes longer."""
        self._backbone = backbone
        self._identity = identity
        self._store = store or UnitStore(None, {})
        self._features = VisionFeatures(backbone)
        self._states = SharedStates(backbone)
        self._batches = [self._batch(inputs) for inputs in batches]

    @classmethod
    def for_samples(
        cls,
        loaded: LoadedBackbone,
        samples: Sequence[Sample],
        batch_size: int,
        folder: Path | None = None,
        answer_tokens: int = ANSWER_TOKENS,
        lengths: Sequence[int] | None = None,
    ) -> AnswerKL:
        """An instance on these samples that keeps its results in ``folder``.

        ``batch_size``: most samples per forward pass; ``lengths``: tokens of each prompt, by which batches are formed.
        """
        chosen = similar_lengths([0] * len(samples) if lengths is None else lengths, batch_size)
        batches = []
        for rows in chosen:
            inputs = loaded.inputs([samples[row] for row in rows])
            batches.append({name: value.to(loaded.device) for name, value in inputs.items()})
        store = UnitStore(folder, model_digest(loaded) if folder else {})
        ids = [sample.id for sample in samples]
        order = [row for rows in chosen for row in rows]
        return cls(loaded.backbone, loaded.identity, ids, batches, store, answer_tokens, order)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def measure(self, stages: Sequence[Stage], policy: TokenPolicy, samples: int | None = None) -> np.ndarray:
        """Answer KL in nats of each sample, float32 ``[samples]``: mean over the tokens of its unpruned answer.

        ``samples``: use the first ones only, in whole batches, so perhaps a few more.
        """
        return self.measure_with_tokens(stages, policy, samples)[0]

    def measure_with_tokens(
        self, stages: Sequence[Stage], policy: TokenPolicy, samples: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `measure`, and the id of each sample's most likely first token, both ``[samples]``."""
        schedule = self._schedule(stages, policy)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in self._batches:
            if samples is not None and self._first_are_done(sum(len(kl) for kl, _ in found), samples):
                break
            found.append(self._measured(batch, schedule))
        kl, tokens = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return self._in_order(kl), self._in_order(tokens)

    def _first_are_done(self, rows: int, samples: int) -> bool:
        """Whether the first ``rows`` rows of the batches are the first samples, at least so many."""
        return rows >= samples and self._order[:rows].max() == rows - 1

    def _in_order(self, rows: np.ndarray) -> np.ndarray:
        """Results of the first rows of the batches, in the order of the samples; ``rows`` along the last dimension."""
        return rows[..., self._order[: rows.shape[-1]].argsort()]

    def measure_single(
        self, layers: Sequence[int], ratios: Sequence[float], policy: TokenPolicy
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Every single stage (layer, ratio), layer by layer from the last to the first.

        Yields:
            ``(layer, answer KL)`` with ``[ratios, samples]`` in nats.
        """
        for layer in sorted(layers, reverse=True):
            rows = []
            for ratio in ratios:
                schedule = self._schedule((Stage(layer=layer, keep_ratio=ratio),), policy)
                found = [self._measured(batch, schedule, layers)[0] for batch in self._batches]
                rows.append(np.concatenate(found))
            yield layer, self._in_order(np.stack(rows))

    def _measured(
        self, batch: _Batch, schedule: Schedule, later: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Answer KL and most likely first token of one batch, from the store or from the model.

        ``later``: first stages of schedules to follow.
        """
        stored = self._store.get(key := self._key(batch, schedule))
        if stored is None:
            kl, tokens = self._pruned(batch, schedule, later)
            self._store.put(key, stored := {"kl": kl.tolist(), "tokens": tokens.tolist()})
        return np.array(stored["kl"], dtype=np.float32), np.array(stored["tokens"], dtype=np.int64)

    def _schedule(self, stages: Sequence[Stage], policy: TokenPolicy) -> Schedule:
        return Schedule(
            backbone=self._identity,
            stages=policy.apply(stages),
            scorer=policy.choice,
            dropped_tokens=policy.dropped_tokens,
        )

    def _key(self, batch: _Batch, schedule: Schedule) -> dict[str, Any]:
        """Identity of one batch under one schedule; the model is in the store's context."""
        fields = {"stages", "scorer", "dropped_tokens", "positions", "image_newlines"}
        return {
            "inputs": batch.digest,
            "answer_tokens": self.answer_tokens,
            "schedule": schedule.model_dump(mode="json", include=fields),
        }

    def _batch(self, prompts: dict[str, Tensor]) -> _Batch:
        """The prompts with the unpruned model's answers and its logits for them."""
        rows = len(prompts["input_ids"])
        self.forwards += rows
        if self.answer_tokens == 1:
            batch = _Batch(prompts, inputs_digest(prompts), (1,) * rows, torch.empty(0))
            return replace(batch, reference=batch.answer_logits(self._logits(batch)).cpu())
        with self._features.reused():
            answers, logits = answers_with_logits(self._backbone, prompts, self.answer_tokens)
        inputs = with_answers(self._backbone, prompts, answers)
        # Results belong to an answer: one that came out otherwise, on another machine, has results of its own.
        batch = _Batch(inputs, inputs_digest(inputs), tuple(map(len, answers)), torch.empty(0))
        if self._backbone.model.dtype != torch.float32:
            # In half precision, the logits of single steps differ from those of one pass by more than a little.
            self.forwards += rows
            logits = self._logits(batch)
        return replace(batch, reference=batch.answer_logits(logits).cpu())

    def _pruned(
        self, batch: _Batch, schedule: Schedule, later: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        with (
            self._states.reused(batch.digest, schedule, later) as skipped,
            pruned(self._backbone, schedule, answer_length=batch.answer_length) as record,
        ):
            # Statistics of the vision tower exist only where it runs.
            logits = self._logits(batch, reuse_features=tower_needs(schedule) is None)
        full = [vision + other for vision, other in zip(record.num_vision, record.num_other, strict=True)]
        ran = [tokens for layer, tokens in enumerate(record.tokens_per_layer) if layer not in skipped]
        forwards = sum(map(sum, ran)) + record.pre_decoder_cost * sum(full)
        self.forwards += forwards / (sum(full) * record.num_layers) * len(full)
        return _mean_kl(batch, logits), logits[:, 0].float().argmax(-1).cpu().numpy()

    def _logits(self, batch: _Batch, reuse_features: bool = True) -> Tensor:
        """Logits of the last prompt position and of the answer's positions, ``[rows, longest answer, vocab]``."""
        model: Any = self._backbone.model
        steps = batch.answer_length + 1
        with torch.inference_mode(), self._features.reused(reuse_features):
            output = model(**batch.inputs, use_cache=False, logits_to_keep=steps)
        return output.logits[:, -steps:]


def _mean_kl(batch: _Batch, logits: Tensor) -> np.ndarray:
    """Answer KL of each row, float32 ``[rows]``; ``logits`` of the pruned model, ``[rows, longest answer, vocab]``."""
    found = batch.answer_logits(logits)
    tokens = max(1, _CHUNK_VALUES // found.shape[1])
    parts = [
        answer_kl(full.to(some.device).float().log_softmax(-1), some.float().log_softmax(-1))
        for full, some in zip(batch.reference.split(tokens), found.split(tokens), strict=True)
    ]
    rows = torch.cat(parts).split(batch.lengths)
    return torch.stack([row.mean() for row in rows]).cpu().numpy()
