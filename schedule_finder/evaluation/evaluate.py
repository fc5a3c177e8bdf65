"""Step 5: the full model against the pruned one and its baselines, on held-out samples."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from pruning_runtime import Schedule, pruned
from pruning_runtime.costs import prefill_flops, published_ratios
from pruning_runtime.schedule import ScorerChoice
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.samples import Sample

BASELINE_SCORERS = ("last_token", "uniform_text", "text_guided", "strided", "random")
"""Scorers tried on the same stages beside the schedule's own."""

COLUMNS = (
    "method",
    "budget",
    "question_type",
    "n",
    "exact_match",
    "ci_low",
    "ci_high",
    "difference",
    "difference_low",
    "difference_high",
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
    """What is run: a schedule under a name; ``budget`` is its target, 1 for the full model.

    ``image_scale``: factor on the sides of images before the processor sees them.
    """

    name: str
    schedule: Schedule
    budget: float = 1.0
    image_scale: float = 1.0


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
        inputs = self._inputs(samples)
        full = Method("full", self.methods[0].schedule.model_copy(update={"stages": ()}))
        reference = self._answer(full, inputs)
        for method in (full, *self.methods):
            if method.image_scale != 1:
                smaller = self._inputs([_scaled(sample, method.image_scale) for sample in samples])
                answer = self._answer(method, smaller)
            else:
                answer = reference if method is full else self._answer(method, inputs)
            self._collect(method, samples, answer, reference)
        self._batches += 1

    def _inputs(self, samples: list[Sample]) -> dict[str, Tensor]:
        return {name: value.to(self.loaded.device) for name, value in self.loaded.inputs(samples).items()}

    def table(self) -> pd.DataFrame:
        """One row per method and question type (``all`` first), with the columns `COLUMNS`."""
        rows = []
        for (name, budget), outcomes in self._outcomes.items():
            kinds = sorted({outcome.question_type for outcome in outcomes})
            for kind in ["all", *(kinds if kinds != ["all"] else [])]:
                chosen = [outcome for outcome in outcomes if kind in ("all", outcome.question_type)]
                summary = _summary(chosen) | self._difference(name, budget, kind)
                rows.append({"method": name, "budget": budget, "question_type": kind, **summary})
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def _difference(self, name: str, budget: float, kind: str) -> dict[str, float]:
        """Exact match less that of the schedule for the same budget, with a paired bootstrap interval."""
        own = self._outcomes.get(("schedule", budget), [])
        pairs = [
            float(one.correct) - float(other.correct)
            for one, other in zip(self._outcomes[name, budget], own, strict=False)
            if one.correct is not None and other.correct is not None and kind in ("all", one.question_type)
        ]
        names = ("difference", "difference_low", "difference_high")
        if not pairs:
            return dict.fromkeys(names, math.nan)
        low, high = paired_interval(np.array(pairs))
        return dict(zip(names, (sum(pairs) / len(pairs), low, high), strict=True))

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
            pre_decoder_cost=record.pre_decoder_cost,
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
            seen, others = answer.num_vision[row], answer.num_other[row]
            computed = sum(layer[row] for layer in answer.vision_per_layer) + answer.pre_decoder_cost * seen
            whole = reference.num_vision[row]
            self._outcomes[method.name, method.budget].append(
                _Outcome(
                    question_type=sample.question_type,
                    correct=None if sample.answer is None else same_answer(answer.texts[row], sample.answer),
                    agrees=same_answer(answer.texts[row], reference.texts[row]),
                    kl=divergence[row],
                    processed=computed / (shape.num_layers * whole),
                    published=sum(published) / shape.num_layers * seen / whole,
                    flops=prefill_flops(
                        shape,
                        [layer[row] + others for layer in answer.vision_per_layer],
                        pre_decoder_tokens=seen + others if answer.pre_decoder_cost else 0,
                    )
                    / prefill_flops(shape, [whole + reference.num_other[row]] * shape.num_layers),
                    kv_bytes=answer.kv_bytes,
                    prefill_ms=answer.prefill_ms,
                )
            )


@dataclass(frozen=True)
class _Answer:
    texts: list[str]
    first_logits: Tensor
    vision_per_layer: list[list[int]]
    pre_decoder_cost: float
    num_vision: tuple[int, ...]
    num_other: tuple[int, ...]
    kv_bytes: float
    prefill_ms: float


def methods_for(schedule: Schedule, baselines: Sequence[str] = BASELINE_SCORERS) -> list[Method]:
    """The schedule, and the baselines: the same stages without residual, and with other scorers."""
    budget = schedule.budget.target if schedule.budget else 1.0
    others = [name for name in baselines if name != schedule.scorer.name]
    methods = [Method("schedule", schedule, budget)]
    if schedule.dropped_tokens != "discard":
        methods.append(
            Method("not merged", schedule.model_copy(update={"dropped_tokens": "discard"}), budget)
        )
    return methods + [
        Method(name, schedule.model_copy(update={"scorer": ScorerChoice(name=name)}), budget)
        for name in others
    ]


def smaller_images(loaded: LoadedBackbone, schedule: Schedule, samples: list[Sample]) -> list[Method]:
    """Control: images down-sampled to the tokens that the schedule processes, and nothing pruned.

    Where the backbone makes as many tokens of any image, there is no such baseline. Judged on ``samples``.
    """
    if schedule.budget is None or not any(sample.images for sample in samples):
        return []
    scale = schedule.budget.processed**0.5

    def tokens(some: list[Sample]) -> int:
        return int(loaded.backbone.vision_mask(loaded.inputs(some)["input_ids"]).sum())

    if tokens([_scaled(sample, scale) for sample in samples]) >= tokens(samples):
        return []
    nothing = schedule.model_copy(update={"stages": ()})
    return [Method("smaller images", nothing, schedule.budget.target, image_scale=scale)]


def paired_interval(differences: np.ndarray, resamples: int = 1000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean difference, resampling samples, ``[samples]``."""
    # A whole number of each difference is drawn: what counts is how often each value occurs.
    values, counts = np.unique(differences, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(differences), counts / len(differences), resamples)
    low, high = np.quantile(drawn @ values / len(differences), [0.025, 0.975])
    return float(low), float(high)


def _scaled(sample: Sample, factor: float) -> Sample:
    """The sample with smaller images."""
    images = tuple(
        image.resize([max(1, round(side * factor)) for side in image.size]) for image in sample.images
    )
    return replace(sample, images=images)


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
