"""What an evaluation compares: the schedule, and one registry entry per baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pruning_runtime import PruningError, Schedule, ScheduleError, UnsupportedBackbone, pruned
from pruning_runtime.schedule import ScorerChoice, Stage
from pruning_runtime.scorers import SCORERS, FeatureScorer, find_scorer
from pruning_runtime.scorers.frames import FrameScorer
from schedule_finder.errors import InputError, OutOfReach
from schedule_finder.evaluation.video_frames import frame_tokens
from schedule_finder.measuring.token_policy import CONTROLS, NOT_MERGED_SUFFIX
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.samples import Sample
from schedule_finder.solvers import BudgetTarget
from schedule_finder.solvers.shapes import random_stages

OWN = "schedule"
"""Name of the method where a single schedule is evaluated."""
SMALLER_IMAGES = "smaller images"
"""Name of the method with down-sampled images, which defines the hard subset."""
RANDOM_DRAWS = 3
MOST_ATTEMPTS = 100
"""Random stages that are tried for so many different draws."""
SWEEP = (0.5, 0.35, 0.25, 0.2, 0.15, 0.1)
"""Budgets of the accuracy curve, in the unit of the schedule's budget."""


@dataclass(frozen=True, eq=False)
class Method:
    """What is run: a schedule under a name.

    Attributes:
        name: in tables and figures.
        schedule: what prunes.
        budget: its target, 1 for the full model.
        image_scale: factor on the sides of images before the processor.
        of: name and digest of the schedule that it is, or is the baseline of; empty for the full model.
        draw: number of a random draw; methods of one name and budget that differ in it are reported together.
    """

    name: str
    schedule: Schedule
    budget: float = 1.0
    image_scale: float = 1.0
    draw: int | None = None
    of: tuple[str, str] = ("", "")

    @property
    def is_schedule(self) -> bool:
        """Whether this is the schedule itself (or, in a sweep, one for another budget) and no baseline."""
        return self.name in (OWN, self.of[0])

    @classmethod
    def full(cls, schedule: Schedule) -> Method:
        """The unpruned model that a schedule belongs to."""
        return cls("full", schedule.model_copy(update={"stages": ()}))


@dataclass(frozen=True)
class Comparison:
    """What baselines are made from.

    Attributes:
        schedule: what they are compared with.
        loaded: the backbone.
        samples: a few held-out samples, from which a baseline may read the number of tokens.
        solve: a schedule for (budget, solver) under the user's scorer and dropped-token setting; a solver of None
            is the user's. Raises `OutOfReach`.
        target: the schedule's budget on the typical prompt.
        earliest: the first layer that a stage may have.
        method: name of the schedule as a method.
        of: see `Method`.
    """

    schedule: Schedule
    loaded: LoadedBackbone
    samples: Sequence[Sample]
    solve: Callable[[float, str | None], Schedule]
    target: Callable[[], BudgetTarget]
    earliest: Callable[[], int]
    method: str = OWN
    of: tuple[str, str] = ("", "")

    @property
    def budget(self) -> float:
        """The schedule's target, 1 where it states none."""
        return self.schedule.budget.target if self.schedule.budget else 1.0


Baseline = Callable[[str, Comparison], Iterator[Method]]
"""Makes the methods of a name; none where the baseline does not apply."""


def _scorer(name: str, comparison: Comparison) -> Iterator[Method]:
    """The same stages with another scorer; none if it is the schedule's own or the backbone refuses it."""
    schedule = comparison.schedule
    if all((stage.scorer or schedule.scorer).name == name for stage in schedule.stages):
        return
    is_of_frames = issubclass(find_scorer(name), FrameScorer) and comparison.samples
    changed = _scored_by_frames(comparison, name) if is_of_frames else scored_by(schedule, name)
    if changed is not None and _can_run(comparison, changed):
        yield Method(name, changed, comparison.budget)


def _scored_by_frames(comparison: Comparison, name: str) -> Schedule | None:
    """The same stages with a rule for video at the first one: after it, frames are not whole. None for one image."""
    sample = comparison.samples[0]
    if not sample.videos and len(sample.images) < 2:
        return None
    size = frame_tokens(comparison.loaded, sample)
    choice = ScorerChoice(name=name, options={} if size is None else {"frame_tokens": size})
    first, *others = comparison.schedule.stages
    stages = (first.model_copy(update={"scorer": choice}), *others)
    return comparison.schedule.model_copy(update={"stages": stages})


def _can_run(comparison: Comparison, schedule: Schedule) -> bool:
    """Whether the backbone and its prompts allow a schedule; some refusals are known in the first forward only."""
    loaded = comparison.loaded
    inputs = loaded.inputs(list(comparison.samples[:1]))
    model: Any = loaded.backbone.model
    try:
        with torch.inference_mode(), pruned(model, schedule):
            model(**{name: value.to(loaded.device) for name, value in inputs.items()}, use_cache=False)
    except (PruningError, ScheduleError, UnsupportedBackbone):
        return False
    return True


def scored_by(schedule: Schedule, name: str) -> Schedule:
    """The same stages, all with the scorer ``name``; one that merges by its own rule needs no other merging."""
    changed = schedule.with_scorer(ScorerChoice(name=name))
    if getattr(find_scorer(name), "joins", None):
        changed = changed.model_copy(update={"dropped_tokens": "discard"})
    return changed


def _random_tokens(name: str, comparison: Comparison) -> Iterator[Method]:
    """The same stages with tokens drawn at random, `RANDOM_DRAWS` times."""
    for method in _scorer(name, comparison):
        for draw in range(RANDOM_DRAWS):
            choice = ScorerChoice(name=name, options={"seed": draw})
            yield replace(method, schedule=method.schedule.with_scorer(choice), draw=draw)


def _not_merged(name: str, comparison: Comparison) -> Iterator[Method]:
    """The same stages and scorer, dropped tokens discarded."""
    schedule = comparison.schedule
    if schedule.dropped_tokens != "discard":
        changed = schedule.model_copy(update={"dropped_tokens": "discard"})
        yield Method(name.replace("-", " "), changed, comparison.budget)


def _published_layers(name: str, comparison: Comparison) -> Iterator[Method]:
    """The schedule's scorer on the stages of the solver ``name``, scaled to the budget."""
    if comparison.schedule.budget is not None:
        with suppress(OutOfReach):  # these leave the first layer whole, which may cost more than the budget
            stages = comparison.solve(comparison.budget, name).stages
            yield Method(name, comparison.schedule.model_copy(update={"stages": stages}), comparison.budget)


def _random_layers(name: str, comparison: Comparison) -> Iterator[Method]:
    """The schedule's scorer on layers and ratios drawn at random within the budget, `RANDOM_DRAWS` different draws.

    Fewer where a small backbone does not have so many: a single stage spends the budget in one way per layer.
    """
    if comparison.schedule.budget is None:
        return
    rule = find_scorer(comparison.schedule.scorer.name)
    needs_layer = issubclass(rule, FeatureScorer) and rule.needs_layer
    earliest = 0 if needs_layer else comparison.earliest()
    rng = np.random.default_rng(0)
    drawn: list[tuple[Stage, ...]] = []
    with suppress(OutOfReach):
        for _ in range(MOST_ATTEMPTS):
            stages = random_stages(comparison.target(), rng, earliest)
            if stages not in drawn:
                drawn.append(stages)
            if len(drawn) == RANDOM_DRAWS:
                break
    for draw, stages in enumerate(drawn):
        changed = comparison.schedule.model_copy(update={"stages": stages})
        yield Method(name.replace("-", " "), changed, comparison.budget, draw=draw)


def _smaller_images(name: str, comparison: Comparison) -> Iterator[Method]:
    """Images down-sampled to the tokens that the schedule processes, and nothing pruned.

    Does not apply to backbones that make equally many tokens of any image.
    """
    schedule, samples = comparison.schedule, list(comparison.samples)
    if schedule.budget is None or not any(sample.images for sample in samples):
        return
    scale = schedule.budget.processed**0.5

    def tokens(some: list[Sample]) -> int:
        loaded = comparison.loaded
        return int(loaded.backbone.vision_mask(loaded.inputs(some)["input_ids"]).sum())

    if tokens([scaled(sample, scale) for sample in samples]) < tokens(samples):
        unpruned = schedule.model_copy(update={"stages": ()})
        yield Method(SMALLER_IMAGES, unpruned, comparison.budget, image_scale=scale)


BASELINES: dict[str, Baseline] = {
    **dict.fromkeys(sorted(SCORERS, key=lambda name: name not in CONTROLS), _scorer),
    "random": _random_tokens,
    "not-merged": _not_merged,
    "paper": _published_layers,
    "pyramid": _published_layers,
    "random-layers": _random_layers,
    "smaller-images": _smaller_images,
}
DEFAULT_BASELINES = ("random", "strided", "last_token", "text_guided")
"""In order; the first `NUM_DEFAULT` other than the schedule's own scorer. Random and evenly spaced tokens are the
controls that need no scores: a schedule that is not better than them is useless. The last token's attention is the
rule of FastV, the most common published baseline."""
NUM_DEFAULT = 3
NOT_MERGED = "not-merged"
_MERGED_ONLY = ("random layers", "smaller images")
ALL = "all"


def baseline_names(text: str | None, schedule: Schedule) -> tuple[str, ...]:
    """The baselines that ``a,b,c``, ``all`` or ``none`` names; None: the default. Raises `InputError`."""
    if text is None:
        others = [name for name in DEFAULT_BASELINES if name != schedule.scorer.name]
        return tuple(others[:NUM_DEFAULT])
    if text == ALL:
        return tuple(BASELINES)
    names = tuple(name.strip() for name in text.split(",")) if text != "none" else ()
    for name in names:
        if name not in BASELINES:
            raise InputError(f"--baselines {name!r}: choose {ALL}, none, or some of {', '.join(BASELINES)}")
    return names


def methods_to_compare(
    comparison: Comparison, baselines: Sequence[str], sweep: Sequence[float] = ()
) -> list[Method]:
    """The schedule and its baselines, and the same for each budget of ``sweep``.

    ``not-merged`` among the baselines adds every merging baseline with its dropped tokens discarded. A sweep always
    has the schedule without merging. A budget that cannot be reached on this backbone is left out.
    """
    methods = _at_one_budget(comparison, baselines)
    for budget in sweep if comparison.schedule.budget else ():
        if abs(budget - comparison.budget) < 1e-9:
            continue
        try:
            other = replace(comparison, schedule=comparison.solve(budget, None))
        except OutOfReach:
            continue
        methods += _at_one_budget(other, baselines)
        if NOT_MERGED not in baselines:
            methods += BASELINES[NOT_MERGED](NOT_MERGED, other)
    return [replace(method, of=comparison.of) for method in methods]


def _at_one_budget(comparison: Comparison, baselines: Sequence[str]) -> list[Method]:
    """The schedule and its baselines, with ``not-merged`` also the merging ones without merging."""
    found = [method for name in baselines for method in BASELINES[name](name, comparison)]
    discarded = [
        replace(
            method,
            name=f"{method.name}{NOT_MERGED_SUFFIX}",
            schedule=method.schedule.model_copy(update={"dropped_tokens": "discard"}),
        )
        for method in found
        if NOT_MERGED in baselines
        and method.schedule.dropped_tokens == "merge"
        and method.name not in _MERGED_ONLY
    ]
    return [Method(comparison.method, comparison.schedule, comparison.budget), *found, *discarded]


def scaled(sample: Sample, factor: float) -> Sample:
    """The sample with smaller images."""
    images = tuple(
        image.resize([max(1, round(side * factor)) for side in image.size]) for image in sample.images
    )
    return replace(sample, images=images)
