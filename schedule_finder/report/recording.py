"""Record the samples of the report's viewer: one pass of the full model and one of the pruned model per sample.

Answers and scores are those of the evaluation, so nothing is generated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from pruning_runtime import Schedule, UnsupportedBackbone, pruned
from schedule_finder.errors import BadSample, InputError, ProfileError
from schedule_finder.evidence import HeldOutSummary, digest
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.profiling.capture import layers_to_profile, profile_batch
from schedule_finder.report.placement import place_tokens
from schedule_finder.report.viewer import (
    StageTokens,
    Viewer,
    ViewerPanel,
    ViewerSample,
    answers_digest,
    as_bytes,
    as_data_uri,
)
from schedule_finder.run.folder import Run
from schedule_finder.samples import DataSet, Sample, read_entries

NUM_SAMPLES = 24
MOST_PANELS = 12
"""Pictures of one sample."""
SIDES = (320, 224)
"""Longest side of a picture in pixels: of a sample with up to two pictures, and with more."""
MOST_BYTES = 1_500_000
"""Attention values of all samples; beyond it, some layers are left out evenly."""


def record_viewer(
    run: Run,
    loaded: LoadedBackbone,
    data: DataSet,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    most: int = NUM_SAMPLES,
) -> Viewer:
    """Run the samples of the viewer; samples that cannot be used any more are left out.

    Raises:
        InputError: the selected schedule was not evaluated.
    """
    schedule = Schedule.load(run.schedule)
    schedule.check_backbone(loaded.backbone)
    chosen = choose_answers(run, schedule)[:most]
    entries = {entry.id: entry for entry in read_entries(run.samples)}
    samples = []
    for number, answers in enumerate(chosen):
        progress(number, len(chosen))
        entry = entries.get(answers.id)
        if entry is None:
            continue
        try:
            sample = data.load(entry)
            samples.append(_record(loaded, schedule, sample, answers, most))
        except (BadSample, ProfileError):
            continue
    progress(len(chosen), len(chosen))
    return Viewer(
        schedule=digest(schedule),
        answers=answers_digest(run),
        num_layers=loaded.backbone.shape.num_layers,
        samples=samples,
    )


@dataclass(frozen=True)
class Answers:
    """The answers to one sample in the evaluation; scores are None without references."""

    id: str
    full: str
    pruned: str
    full_score: float | None
    pruned_score: float | None
    agrees: bool
    kl: float

    @property
    def order(self) -> tuple[int, float]:
        """Broken by pruning first, then other wrong answers, other changes, and the rest; each by answer KL."""
        full, short = self.full_score, self.pruned_score
        if full is not None and short is not None and short < full:
            kind = 0
        elif short is not None and short < 0.5:
            kind = 1
        else:
            kind = 2 if not self.agrees else 3
        return kind, -self.kl


def choose_answers(run: Run, schedule: Schedule) -> list[Answers]:
    """All samples of the evaluation of ``schedule``, wrong answers first. Raises `InputError` without one."""
    summary = HeldOutSummary.load(run.evaluation_summary)
    part = summary and summary.of(digest(schedule))
    if part is None:
        raise InputError(
            f"{run.folder}: the selected schedule was not evaluated; run `adaptinfer-profile evaluate {run.folder}`"
        )
    answers_digest(run)
    table = pd.read_parquet(run.answers)
    own = table[(table.schedule == part.name) & table.method.isin(["schedule", part.name])]
    own = own[(own.budget - part.budget).abs() < 1e-9].drop_duplicates("id").set_index("id")
    full = table[table.method == "full"].drop_duplicates("id").set_index("id")
    whole = full[["answer", "score"]].rename(columns="{}_full".format)
    both = own.join(whole, how="inner")
    found = [
        Answers(
            id=str(name),
            full=str(row.answer_full),
            pruned=str(row.answer),
            full_score=_number(row.score_full),
            pruned_score=_number(row.score),
            agrees=bool(row.agrees),
            kl=float(row.kl),
        )
        for name, row in both.iterrows()
    ]
    return sorted(found, key=lambda one: one.order)


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)


def _record(
    loaded: LoadedBackbone, schedule: Schedule, sample: Sample, answers: Answers, most: int
) -> ViewerSample:
    host = loaded.inputs([sample])
    inputs = {name: value.to(loaded.device) for name, value in host.items()}
    placed = place_tokens(loaded, sample, inputs)
    side = SIDES[0] if len(placed.panels) <= 2 else SIDES[1]
    panels = placed.panels[:MOST_PANELS]
    places = [place if place is None or place[0] < len(panels) else None for place in placed.places]
    layers, attention, missing = _attention(loaded, host, most)
    values, peaks = as_bytes(attention)
    notes = [placed.note, missing]
    if len(placed.panels) > MOST_PANELS:
        notes.append(f"only the first {MOST_PANELS} of {len(placed.panels)} pictures are shown")
    if any(scorer.name == "random" for scorer in schedule.scorers().values()):
        notes.append("the random scorer draws other tokens here than in the evaluation")
    return ViewerSample(
        id=sample.id,
        question=sample.question,
        question_type=sample.question_type,
        references=list(sample.all_references),
        full_answer=answers.full,
        pruned_answer=answers.pruned,
        full_score=answers.full_score,
        pruned_score=answers.pruned_score,
        kl=answers.kl,
        panels=[
            ViewerPanel(
                picture=as_data_uri(panel.picture, side),
                rows=panel.rows,
                columns=panel.columns,
                width=panel.width,
                height=panel.height,
            )
            for panel in panels
        ],
        places=places,
        layers=layers,
        attention=values,
        peaks=peaks,
        stages=_kept(loaded, schedule, inputs),
        note="; ".join(one for one in notes if one) or None,
    )


def _attention(
    loaded: LoadedBackbone, inputs: dict[str, Any], samples: int
) -> tuple[list[int], np.ndarray, str | None]:
    """Layers, attention of the text queries to each vision token ``[layers, tokens]``, and what is missing."""
    try:
        row = profile_batch(loaded.backbone, inputs)[0]
    except UnsupportedBackbone as error:
        return [], np.zeros((0, 0)), str(error)
    layers, _ = layers_to_profile(loaded.backbone)
    attention = row.scores["uniform_text"]
    step = max(1, -(-attention.size * samples // MOST_BYTES))
    note = f"attention is recorded at every {step}th layer" if step > 1 else None
    return layers[::step], attention[::step].astype(np.float64), note


def _kept(loaded: LoadedBackbone, schedule: Schedule, inputs: dict[str, Any]) -> list[StageTokens]:
    """Tokens that each stage keeps, by number among the vision tokens."""
    vision = loaded.backbone.vision_mask(inputs["input_ids"])[0].nonzero().flatten().tolist()
    number = {position: index for index, position in enumerate(vision)}
    model: Any = loaded.backbone.model
    with torch.inference_mode(), pruned(model, schedule) as record:
        model(**inputs, use_cache=False, logits_to_keep=1)
    return [
        StageTokens(layer=stage.layer, kept=[number[position] for position in stage.kept_positions()[0]])
        for stage in record.stages
    ]
