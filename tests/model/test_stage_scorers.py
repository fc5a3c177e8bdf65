"""Stages with scorers of their own, on the plain and on the static path."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from pruning_runtime import Record, Schedule, ScheduleError, pruned
from pruning_runtime.schedule import ScorerChoice
from tests.support.exactness import reference
from tests.support.greedy import generate
from tests.support.rounding import rounding_bound
from tests.support.schedules import schedule_for
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_models import FAMILIES, Inputs

STAGES = ((-1, 0.75), (1, 0.5), (3, 0.25))


def with_scorers(schedule: Schedule, *names: str | None) -> Schedule:
    """The schedule with a scorer of its own at each stage; None: the schedule's."""
    stages = tuple(
        stage.model_copy(update={"scorer": None if name is None else ScorerChoice(name=name)})
        for stage, name in zip(schedule.stages, names, strict=True)
    )
    return schedule.model_copy(update={"stages": stages})


def kept(model: Any, inputs: Inputs, schedule: Schedule, **options: Any) -> list[list[list[int]]]:
    with pruned(model, schedule, **options) as record, torch.no_grad():
        model(**inputs)
    return [stage.kept_positions() for stage in record.stages]


MIXES = [
    ("strided", "text_guided", "last_token"),
    ("text_guided", "strided", None),
    (None, "uniform_text", "strided"),
]


@pytest.mark.parametrize("names", MIXES, ids=lambda names: "-".join(map(str, names)))
def test_a_mixed_schedule_equals_the_masked_sequence(names: tuple[str | None, ...]) -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((2, 1))
    schedule = with_scorers(schedule_for(model, *STAGES), *names)
    with pruned(model, schedule) as record:
        tokens, logits = generate(model, inputs, steps=4)
    assert [stage.scorer for stage in record.stages] == [name or "text_guided" for name in names]
    assert (logits - reference(model, inputs, tokens, record)).abs().max() < rounding_bound(model, inputs)


@pytest.mark.parametrize("names", MIXES, ids=lambda names: "-".join(map(str, names)))
def test_each_stage_keeps_what_its_own_scorer_ranks_highest(names: tuple[str | None, ...]) -> None:
    """The first stage of a mix keeps what a schedule with that scorer alone keeps there, and so on."""
    tiny = FAMILIES["qwen2_vl"]
    model, inputs = tiny.build(), tiny.batch((2, 1))
    plain = schedule_for(model, *STAGES)
    found = kept(model, inputs, with_scorers(plain, *names))
    for stage in range(len(STAGES)):
        # Same scorers before this stage, this stage's scorer for all stages from here on.
        own = names[stage] or "text_guided"
        same = with_scorers(plain, *names[:stage], *[own] * (len(STAGES) - stage))
        other = with_scorers(plain, *names[:stage], *["random"] * (len(STAGES) - stage))
        assert kept(model, inputs, same)[stage] == found[stage]
        assert kept(model, inputs, other)[stage] != found[stage]


@pytest.mark.parametrize("names", MIXES, ids=lambda names: "-".join(map(str, names)))
def test_the_static_path_uses_the_same_scorers(names: tuple[str | None, ...]) -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((2, 1))
    schedule = with_scorers(schedule_for(model, *STAGES), *names)
    records: list[Record] = []
    for fast in (False, True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fast=True: there are no CUDA graphs")
            with pruned(model, schedule, fast=fast) as record, torch.inference_mode():
                model(**inputs)
        records.append(record)
    plain, static = records
    assert static.fast_prefills == 1
    assert [stage.scorer for stage in static.stages] == [stage.scorer for stage in plain.stages]
    assert [s.kept_positions() for s in static.stages] == [s.kept_positions() for s in plain.stages]


def test_scoring_before_the_decoder_is_charged_by_the_first_stage_s_scorer() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1,))
    schedule = schedule_for(model, *STAGES)
    costs = []
    for first in ("strided", "text_guided"):
        with pruned(model, with_scorers(schedule, first, None, None)) as record, torch.no_grad():
            model(**inputs)
        costs.append(record.pre_decoder_cost)
    assert costs[0] == 0
    assert 0 < costs[1] < 1


def test_a_stage_without_keys_may_have_a_position_scorer() -> None:
    """Qwen3.5's layer 0 is recurrent: attention cannot score there, positions can."""
    family = FAMILIES_A["qwen3_5"]
    if not family.available:
        return
    model, inputs = family.build(), family.batch((1,))
    schedule = schedule_for(model, (0, 0.5), (1, 0.25))
    with pytest.raises(ScheduleError, match="layer 0"), pruned(model, schedule):
        pass
    assert len(kept(model, inputs, with_scorers(schedule, "strided", None))) == 2


def test_with_scorer_replaces_all() -> None:
    schedule = with_scorers(schedule_for(FAMILIES["llava"].build(), *STAGES), *MIXES[0])
    scorers = schedule.with_scorer(ScorerChoice(name="strided")).scorers()
    assert {layer: scorer.name for layer, scorer in scorers.items()} == dict.fromkeys((-1, 1, 3), "strided")
