"""Ask the full model a few samples before a long run begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from schedule_finder.evaluation.answers import answer_quality, metric_of
from schedule_finder.evidence import AnswerQuality
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.samples import BadSample, DataSet, Sample, SampleEntry

NUM_FIRST = 16


def ask_full_model(
    loaded: LoadedBackbone,
    samples: Sequence[Sample],
    batch_size: int,
    max_new_tokens: int,
    metric: str | None = None,
) -> AnswerQuality:
    """Greedy answers of the unpruned model, judged by `answer_quality`; ``metric`` None: each sample's own."""
    answers: list[str] = []
    for first in range(0, len(samples), batch_size):
        batch = list(samples[first : first + batch_size])
        inputs = {name: value.to(loaded.device) for name, value in loaded.inputs(batch).items()}
        generated = loaded.generate(inputs, max_new_tokens)
        answers += loaded.answers(generated[:, inputs["input_ids"].shape[1] :])
    return answer_quality(
        [sample.id for sample in samples],
        answers,
        [sample.all_references for sample in samples],
        [metric_of(sample, metric) for sample in samples],
    )


def first_samples(data: DataSet, entries: Sequence[SampleEntry]) -> list[Sample]:
    """The first `NUM_FIRST` held-out samples that load, calibration samples where none are held out."""
    held_out = [entry for entry in entries if entry.use == "held_out"]
    loadable = _loadable(data, held_out or entries)
    return [sample for sample, _ in zip(loadable, range(NUM_FIRST), strict=False)]


def _loadable(data: DataSet, entries: Sequence[SampleEntry]) -> Iterator[Sample]:
    tried = entries[: 4 * NUM_FIRST]  # a data set that cannot be read is refused by the profile
    for entry in tried:
        try:
            yield data.load(entry)
        except BadSample:
            continue
