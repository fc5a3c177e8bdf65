"""Step 5: run the full model and every method on held-out samples, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from pruning_runtime import Schedule, pruned
from pruning_runtime.costs import prefill_flops, published_ratios
from pruning_runtime.schedule import ScorerChoice
from pruning_runtime.setup import tower_needs
from schedule_finder.evaluation.answers import metric_of, quality_of, write_answers
from schedule_finder.evaluation.methods import Method, scaled
from schedule_finder.evaluation.metrics import METRICS, same_answer
from schedule_finder.evaluation.outcomes import Outcome, summarize
from schedule_finder.evaluation.prompt_cost import prompt_cost
from schedule_finder.evidence import AnswerQuality
from schedule_finder.measuring.answer_kl import answer_kl
from schedule_finder.measuring.unit_store import UnitStore, inputs_digest
from schedule_finder.measuring.vision_features import VisionFeatures
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.samples import Sample

MOST_BATCHES = 1_000_003
"""Distance of the seeds of two random draws; each batch of a draw has a seed of its own."""


@dataclass
class Evaluation:
    """Collects outcomes batch by batch.

    All methods run on the same batches, in turn, so that a machine that slows down slows all of them. A batch that
    ``store`` has for a method is not run again.

    Attributes:
        loaded: the backbone.
        methods: what is compared with the full model.
        max_new_tokens: longest answer.
        metric: name of the metric; None: each sample's own.
        store: keeps finished units, one method on one batch; its context must identify the model.
        after_unit: called with the number of samples after each unit, and with the seconds that the full model took
            for the batch, None where all of it came from the store so far.
    """

    loaded: LoadedBackbone
    methods: Sequence[Method]
    max_new_tokens: int = 16
    store: UnitStore = field(default_factory=lambda: UnitStore(None, {}))
    metric: str | None = None
    after_unit: Callable[[int, float | None], None] = lambda _samples, _seconds: None

    def __post_init__(self) -> None:
        self.full = Method.full(self.methods[0].schedule)
        self._outcomes: dict[Method, list[Outcome]] = {method: [] for method in (self.full, *self.methods)}
        self._batches = 0

    def run_batch(self, samples: list[Sample]) -> None:
        """Answer one batch with the full model and with every method."""
        batch = _Batch(self, samples, self._batches)
        for method, found in self._outcomes.items():
            found += batch.outcomes(method)
            self.after_unit(len(samples), batch.full_seconds)
        self._batches += 1

    def table(self) -> pd.DataFrame:
        """One row per method and question type; see `summarize`."""
        return summarize(self._outcomes)

    def write_answers(self, path: Path) -> None:
        """Write every answer so far; see `answers_table`."""
        write_answers(path, self._outcomes)

    def full_model(self) -> AnswerQuality:
        """Whether the full model's answers so far are usable."""
        return quality_of(self._outcomes[self.full])


class _Batch:
    """One batch of samples; the full model answers it when the first method needs that."""

    def __init__(self, evaluation: Evaluation, samples: list[Sample], number: int) -> None:
        self._evaluation = evaluation
        self._samples = samples
        self._number = number
        self._inputs = self._on_device(samples)
        self._reference: _Answer | None = None
        self._features = VisionFeatures(evaluation.loaded.backbone)
        self.full_seconds: float | None = None
        """What the full model took; None until it had to run."""
        known = [
            (sample.id, sample.question_type, sample.all_references, metric_of(sample, evaluation.metric))
            for sample in samples
        ]
        self._key = {"inputs": inputs_digest(self._inputs), "samples": known}

    def outcomes(self, method: Method) -> list[Outcome]:
        """One method's outcomes, from the store or from the model, one per sample."""
        store, schedule = self._evaluation.store, self._seeded(method.schedule)
        key = self._key | {
            "schedule": schedule.model_dump(mode="json", exclude={"budget", "evidence", "provenance"}),
            "image_scale": method.image_scale,
            "max_new_tokens": self._evaluation.max_new_tokens,
        }
        stored = store.get(key)
        if stored is None:
            answer = reference = self._full()
            if method.image_scale != 1:
                smaller = [scaled(sample, method.image_scale) for sample in self._samples]
                answer = self._answer(schedule, self._on_device(smaller))
            elif method is not self._evaluation.full:
                answer = self._answer(schedule, self._inputs)
            store.put(key, stored := [_to_store(one) for one in self._judge(schedule, answer, reference)])
        return [
            Outcome(**one, reference=sample.answer, references=sample.all_references)
            for one, sample in zip(stored, self._samples, strict=True)
        ]

    def _full(self) -> _Answer:
        if self._reference is None:
            begun = time.perf_counter()
            self._reference = self._answer(self._evaluation.full.schedule, self._inputs)
            self.full_seconds = time.perf_counter() - begun
        return self._reference

    def _seeded(self, schedule: Schedule) -> Schedule:
        """The schedule, with another seed for every batch and every draw where it scores at random."""
        stages = tuple(
            stage
            if stage.scorer is None
            else stage.model_copy(update={"scorer": self._seeded_choice(stage.scorer)})
            for stage in schedule.stages
        )
        return schedule.model_copy(update={"scorer": self._seeded_choice(schedule.scorer), "stages": stages})

    def _seeded_choice(self, choice: ScorerChoice) -> ScorerChoice:
        if choice.name != "random":
            return choice
        drawn = int(choice.options.get("seed", 0))
        return ScorerChoice(name="random", options={"seed": drawn * MOST_BATCHES + self._number})

    def _on_device(self, samples: list[Sample]) -> dict[str, Tensor]:
        loaded = self._evaluation.loaded
        return {name: value.to(loaded.device) for name, value in loaded.inputs(samples).items()}

    def _answer(self, schedule: Schedule, inputs: dict[str, Tensor]) -> _Answer:
        loaded = self._evaluation.loaded
        # Statistics of the vision tower exist only where it runs.
        reused = self._features.reused(tower_needs(schedule) is None)
        with reused, pruned(loaded.backbone, schedule, timing=True) as record:
            output = loaded.generate(
                inputs, self._evaluation.max_new_tokens, output_logits=True, return_dict_in_generate=True
            )
        texts = loaded.answers(output.sequences[:, inputs["input_ids"].shape[1] :])
        return _Answer(
            texts=texts,
            first_token=output.logits[0].float().log_softmax(-1),
            vision_per_layer=record.vision_tokens_per_layer,
            pre_decoder_cost=record.pre_decoder_cost,
            num_vision=record.num_vision,
            num_other=record.num_other,
            kv_bytes=record.cache_bytes / len(texts),
            prefill_ms=record.milliseconds["prefill"] / len(texts),
        )

    def _judge(self, schedule: Schedule, answer: _Answer, reference: _Answer) -> list[Outcome]:
        """Compare answers with the reference answers and with the full model's."""
        shape = self._evaluation.loaded.backbone.shape
        published = sum(published_ratios(schedule.stages, shape.num_layers)) / shape.num_layers
        kl = answer_kl(reference.first_token, answer.first_token).tolist()
        found = []
        for row, sample in enumerate(self._samples):
            whole, others = reference.num_vision[row], reference.num_other[row]
            cost = prompt_cost(
                schedule,
                shape,
                [layer[row] for layer in answer.vision_per_layer],
                answer.num_vision[row],
                answer.num_other[row],
                answer.pre_decoder_cost,
            )
            full_flops = prefill_flops(shape, [whole + others] * shape.num_layers)
            metric, references = metric_of(sample, self._evaluation.metric), sample.all_references
            found.append(
                Outcome(
                    id=sample.id,
                    question_type=sample.question_type,
                    answer=answer.texts[row],
                    correct=_same_as_any(answer.texts[row], references),
                    agrees=same_answer(answer.texts[row], reference.texts[row]),
                    kl=kl[row],
                    processed=cost.computed / (shape.num_layers * whole),
                    published=published * answer.num_vision[row] / whole,
                    flops=cost.flops / full_flops,
                    kv_bytes=answer.kv_bytes,
                    prefill_ms=answer.prefill_ms,
                    metric=metric,
                    score=METRICS[metric].score(answer.texts[row], references) if references else None,
                )
            )
        return found


def _to_store(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON-able fields; the reference answers are the sample's and are not stored again."""
    return {name: value for name, value in asdict(outcome).items() if not name.startswith("reference")}


def _same_as_any(text: str, references: Sequence[str]) -> bool | None:
    """Exact match; None where there are no references."""
    return any(same_answer(text, reference) for reference in references) if references else None


@dataclass(frozen=True)
class _Answer:
    """What a method generated for a batch, and what that cost; without the cache, which is large.

    ``first_token``: log-probabilities, ``[rows, vocabulary]``; ``vision_per_layer``: ``[layers][rows]``.
    """

    texts: list[str]
    first_token: Tensor
    vision_per_layer: list[list[int]]
    pre_decoder_cost: float
    num_vision: tuple[int, ...]
    num_other: tuple[int, ...]
    kv_bytes: float
    prefill_ms: float
