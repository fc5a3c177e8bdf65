"""Step 5: the full model against the pruned one and its controls, on held-out samples."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor

from pruning_runtime import Schedule, pruned
from pruning_runtime.accounting import flops_ratio, published_ratios
from pruning_runtime.schedule import ScorerChoice
from schedule_finder.backbones import LoadedBackbone
from schedule_finder.samples import Sample

CONTROLS = ("last_token", "uniform_text", "text_guided", "strided", "random")
"""Scorers tried on the same stages beside the schedule's own."""

COLUMNS = (
    "method",
    "budget",
    "question_type",
    "n",
    "exact_match",
    "ci_low",
    "ci_high",
    "agreement",
    "kl",
    "processed",
    "published",
    "flops",
    "kv_bytes",
    "prefill_ms",
)


@dataclass(frozen=True)
class Method:
    """What is run: a schedule under a name; ``budget`` is its target, 1 for the full model."""

    name: str
    schedule: Schedule
    budget: float = 1.0


@dataclass
class _Outcome:
    """One method on one sample."""

    question_type: str
    correct: bool | None
    agrees: bool
    kl: float
    processed: float
    published: float
    flops: float
    kv_bytes: float
    prefill_ms: float


@dataclass
class Evaluation:
    """Collects outcomes batch by batch; all methods see the same batches, in turn."""

    loaded: LoadedBackbone
    methods: Sequence[Method]
    max_new_tokens: int = 16
    _outcomes: dict[tuple[str, float], list[_Outcome]] = field(default_factory=lambda: defaultdict(list))
    _batches: int = 0

    def run_batch(self, samples: list[Sample]) -> None:
        """Answer one batch with the full model and with every method.

        Interleaved by batch, so that a machine that slows down slows all methods alike.
        """
        inputs = {name: value.to(self.loaded.device) for name, value in self.loaded.inputs(samples).items()}
        full = Method("full", self.methods[0].schedule.model_copy(update={"stages": ()}))
        reference = self._answer(full, inputs)
        for method in (full, *self.methods):
            answer = reference if method is full else self._answer(method, inputs)
            self._collect(method, samples, answer, reference)
        self._batches += 1

    def table(self) -> pd.DataFrame:
        """One row per method and question type (``all`` first), with the columns `COLUMNS`."""
        rows = []
        for (name, budget), outcomes in self._outcomes.items():
            kinds = sorted({outcome.question_type for outcome in outcomes})
            for kind in ["all", *(kinds if kinds != ["all"] else [])]:
                chosen = [outcome for outcome in outcomes if kind in ("all", outcome.question_type)]
                rows.append({"method": name, "budget": budget, "question_type": kind, **_summary(chosen)})
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def _answer(self, method: Method, inputs: dict[str, Tensor]) -> _Answer:
        schedule = method.schedule
        if schedule.scorer.name == "random":
            # Another draw for every batch: one unlucky order must not decide.
            schedule = schedule.model_copy(
                update={"scorer": ScorerChoice(name="random", options={"seed": self._batches})}
            )
        with pruned(self.loaded.backbone.model, schedule, timing=True) as record:
            output = self.loaded.generate(
                inputs, self.max_new_tokens, output_logits=True, return_dict_in_generate=True
            )
        texts = self.loaded.answers(output.sequences[:, inputs["input_ids"].shape[1] :])
        rows = len(texts)
        return _Answer(
            texts=texts,
            first_logits=output.logits[0].float(),
            vision_per_layer=record.vision_tokens_per_layer,
            num_vision=record.num_vision,
            num_other=record.num_other,
            kv_bytes=record.cache_bytes / rows,
            prefill_ms=record.milliseconds["prefill"] / rows,
        )

    def _collect(self, method: Method, samples: list[Sample], answer: _Answer, reference: _Answer) -> None:
        log_full = reference.first_logits.log_softmax(-1)
        log_pruned = answer.first_logits.log_softmax(-1)
        divergence = (log_full.exp() * (log_full - log_pruned)).sum(-1).clamp(min=0).tolist()
        stages, shape = method.schedule.stages, self.loaded.backbone.shape
        published = published_ratios(stages, shape.num_layers)
        for row, sample in enumerate(samples):
            computed = sum(layer[row] for layer in answer.vision_per_layer)
            self._outcomes[method.name, method.budget].append(
                _Outcome(
                    question_type=sample.question_type,
                    correct=None if sample.answer is None else same_answer(answer.texts[row], sample.answer),
                    agrees=same_answer(answer.texts[row], reference.texts[row]),
                    kl=divergence[row],
                    processed=computed / (shape.num_layers * answer.num_vision[row]),
                    published=sum(published) / shape.num_layers,
                    flops=flops_ratio(stages, shape, answer.num_vision[row], answer.num_other[row]),
                    kv_bytes=answer.kv_bytes,
                    prefill_ms=answer.prefill_ms,
                )
            )


@dataclass(frozen=True)
class _Answer:
    texts: list[str]
    first_logits: Tensor
    vision_per_layer: list[list[int]]
    num_vision: tuple[int, ...]
    num_other: tuple[int, ...]
    kv_bytes: float
    prefill_ms: float


def methods_for(schedule: Schedule, controls: Sequence[str] = CONTROLS) -> list[Method]:
    """The schedule, and the controls: the same stages without residual, and with other scorers."""
    budget = schedule.budget.target if schedule.budget else 1.0
    others = [name for name in controls if name != schedule.scorer.name]
    methods = [Method("schedule", schedule, budget)]
    if schedule.residual != "none":
        methods.append(Method("not merged", schedule.model_copy(update={"residual": "none"}), budget))
    return methods + [
        Method(name, schedule.model_copy(update={"scorer": ScorerChoice(name=name)}), budget)
        for name in others
    ]


def same_answer(found: str, expected: str) -> bool:
    """Exact match after lower-casing and dropping articles, punctuation and surplus space."""
    return _normalised(found) == _normalised(expected)


def _normalised(text: str) -> str:
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def wilson_interval(successes: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson's score interval)."""
    if count == 0:
        return math.nan, math.nan
    share = successes / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _summary(outcomes: Sequence[_Outcome]) -> dict[str, Any]:
    judged = [outcome.correct for outcome in outcomes if outcome.correct is not None]
    low, high = wilson_interval(sum(judged), len(judged))

    def mean(pick: Callable[[_Outcome], float]) -> float:
        return sum(map(pick, outcomes)) / len(outcomes)

    return {
        "n": len(outcomes),
        "exact_match": sum(judged) / len(judged) if judged else math.nan,
        "ci_low": low,
        "ci_high": high,
        "agreement": mean(lambda outcome: outcome.agrees),
        "kl": mean(lambda outcome: outcome.kl),
        "processed": mean(lambda outcome: outcome.processed),
        "published": mean(lambda outcome: outcome.published),
        "flops": mean(lambda outcome: outcome.flops),
        "kv_bytes": mean(lambda outcome: outcome.kv_bytes),
        "prefill_ms": mean(lambda outcome: outcome.prefill_ms),
    }
