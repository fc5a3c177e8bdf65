"""`apply` and its handle, schedules given as files, and what notebooks and terminals show."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch

from pruning_runtime import PruningError, Record, Schedule, ScheduleError, apply, pruned, register_scorer
from pruning_runtime.schedule import Budget, ScorerChoice
from pruning_runtime.scorers import SCORERS, FeatureScorer, find_scorer
from tests.support.model_state import state_of
from tests.support.schedules import schedule_for
from tests.support.tiny_models import FAMILIES

TINY = FAMILIES["llava"]


def test_an_applied_schedule_is_the_with_until_it_is_removed() -> None:
    model, inputs = TINY.build(), TINY.batch((1, 2))
    schedule = schedule_for(model, (1, 0.5))
    model.generate(**inputs, max_new_tokens=2)
    before = copy.deepcopy(state_of(model))
    with pruned(model, schedule), torch.no_grad():
        wanted = model(**inputs).logits
    handle = apply(model, schedule)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, wanted)
        assert torch.equal(model(**inputs).logits, wanted)
    assert handle.record.prefills == 2
    assert handle.active
    handle.remove()
    handle.remove()
    assert not handle.active
    assert state_of(model) == before
    with pruned(model, schedule):
        pass


@pytest.mark.parametrize("scorer", ["text_guided", "visionzip"])
def test_a_dropped_handle_leaves_the_schedule_applied(scorer: str) -> None:
    """The attention tap and the tower's tap must not end with the last reference to the handle."""
    model, inputs = TINY.build(), TINY.batch((1,))
    schedule = schedule_for(model, (-1, 0.5)).with_scorer(ScorerChoice(name=scorer))
    record = apply(model, schedule).record
    gc.collect()
    with torch.no_grad():
        model(**inputs)
    assert record.stages[0].keep == (8,)


def test_a_model_can_be_freed_once_its_schedule_is_removed() -> None:
    model = TINY.build()
    apply(model, schedule_for(model, (1, 0.5))).remove()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_model_with_a_schedule_refuses_another() -> None:
    model = TINY.build()
    handle = apply(model, schedule_for(model, (1, 0.5)))
    with pytest.raises(PruningError, match="call `remove`"):
        apply(model, schedule_for(model, (2, 0.5)))
    with pytest.raises(PruningError, match="call `remove`"), pruned(model, schedule_for(model, (1, 0.5))):
        pass
    assert handle.active
    handle.remove()


def test_an_error_at_set_up_leaves_the_model_free() -> None:
    model = TINY.build()
    before = copy.deepcopy(state_of(model))
    with pytest.raises(PruningError, match="answer_length"):
        apply(model, schedule_for(model, (1, 0.5)), answer_length=-1)
    other = schedule_for(model, (1, 0.5))
    other = other.model_copy(update={"backbone": other.backbone.model_copy(update={"num_layers": 9})})
    with pytest.raises(ScheduleError):
        apply(model, other)
    assert state_of(model) == before
    apply(model, schedule_for(model, (1, 0.5))).remove()


def test_a_schedule_is_given_as_a_file_or_a_preset(tmp_path: Path) -> None:
    model, inputs = TINY.build(), TINY.batch((1,))
    schedule = schedule_for(model, (1, 0.5))
    schedule.save(tmp_path / "mine.json")
    for given in (tmp_path / "mine.json", str(tmp_path / "mine.json")):
        with pruned(model, given) as record, torch.no_grad():
            model(**inputs)
        assert record.stages[0].keep == (8,)
    assert Schedule.of("fastv/llava-1.5-7b") == Schedule.preset("fastv/llava-1.5-7b")
    with pytest.raises(ScheduleError, match="no such file"):
        apply(model, tmp_path / "other.json")


def test_representations_are_short_and_escape_text() -> None:
    model, inputs = TINY.build(), TINY.batch((1,))
    schedule = schedule_for(model, (-1, 0.5), (3, 0.25))
    name = schedule.backbone.model_copy(update={"name": "<b>mine</b>"})
    cost = Budget(kind="processed", target=0.4, processed=0.375, published=0.3)
    schedule = schedule.model_copy(update={"backbone": name, "budget": cost})
    assert repr(schedule) == (
        "<Schedule <b>mine</b>: before the decoder 50 %, after layer 3 25 % "
        f"({schedule.scorer.name}, discard, 37.5 % processed)>"
    )
    html = schedule._repr_html_()
    assert "&lt;b&gt;mine" in html
    assert "after layer 3" in html
    with pruned(model, schedule) as record, torch.no_grad():
        assert repr(record) == "<Record: no prefill yet>"
        assert "no prefill yet" in record._repr_html_()
        model(**inputs)
    assert repr(record).startswith("<Record: 1 row(s), 16 vision tokens, ")
    assert "<td>before the decoder</td><td>8</td>" in record._repr_html_()
    handle = apply(model, schedule)
    assert repr(handle).startswith("<AppliedSchedule (active): <Schedule")
    handle.remove()
    assert "removed" in repr(handle)
    assert "prefill" in str(Record(num_layers=2))


def test_a_scorer_of_the_users_own_is_registered_in_this_process() -> None:
    class Brightest(FeatureScorer):
        name = "brightest"

        def score(self, tokens):  # type: ignore[no-untyped-def]
            return tokens.features.norm(dim=-1)

    try:
        assert register_scorer(Brightest) is Brightest
        assert find_scorer("brightest") is Brightest
        model, inputs = TINY.build(), TINY.batch((1,))
        schedule = schedule_for(model, (1, 0.5)).with_scorer(ScorerChoice(name="brightest"))
        with pruned(model, schedule) as record, torch.no_grad():
            model(**inputs)
        assert record.stages[0].scorer == "brightest"
    finally:
        SCORERS.pop("brightest", None)
    with pytest.raises(ValueError, match="not a subclass"):
        register_scorer(dict)  # type: ignore[arg-type]
    taken = type("Other", (Brightest,), {"name": "divprune"})
    with pytest.raises(ValueError, match="known already as DivPrune"):
        register_scorer(taken)
