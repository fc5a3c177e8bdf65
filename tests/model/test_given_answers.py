"""A given answer behind the prompt: one pass gives what the pruned prompt gives when the answer is fed to its cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_runtime import PruningError, Record, Schedule, pruned
from pruning_runtime.scorers import SCORERS
from tests.support import greedy
from tests.support.own_mask_reference import append_tokens
from tests.support.rounding import rounding_bound
from tests.support.schedules import schedule_for
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import FAMILIES, Inputs

STEPS = 5
ROWS = (2, 1)
Family = tuple[PreTrainedModel, Inputs, Callable[[Inputs, Tensor], Inputs], dict[str, Any]]


def family_of(name: str) -> Family:
    """A model, left-padded prompts, how tokens are appended to them, and further arguments of `pruned`."""
    if name in FAMILIES:
        return FAMILIES[name].build(), FAMILIES[name].batch(ROWS), append_tokens, {}
    if name in FAMILIES_A:
        if not FAMILIES_A[name].available:
            pytest.skip(f"this release of transformers has no {FAMILIES_A[name].class_name}")
        return FAMILIES_A[name].build(), FAMILIES_A[name].batch(ROWS), append_tokens, {}
    family = FAMILIES_B[name]
    if family.missing:
        pytest.skip(family.missing)
    return family.build(), family.batch(ROWS), family.extend, {}


def step_by_step(
    model: PreTrainedModel, inputs: Inputs, schedule: Schedule, **options: Any
) -> tuple[Tensor, Tensor, Record]:
    """An answer of `STEPS` tokens on the pruned prompt's cache, the logits that chose them, and the record."""
    with pruned(model, schedule, **options) as record:
        tokens, logits = greedy.generate(model, inputs, steps=STEPS)
    return tokens, logits, record


def in_one_pass(
    model: PreTrainedModel, inputs: Inputs, schedule: Schedule, answer_length: int, **options: Any
) -> tuple[Tensor, Record]:
    """Logits of the last prompt position and of the answer behind it, and the record."""
    with torch.inference_mode(), pruned(model, schedule, answer_length=answer_length, **options) as record:
        output = model(**inputs, use_cache=False, logits_to_keep=answer_length + 1)
    return output.logits[:, -answer_length - 1 :], record


def kept_of(record: Record) -> list[list[list[int]]]:
    return [stage.kept_positions() for stage in record.stages]


HYBRIDS = ("qwen3_5", "lfm2_vl")
ATTENTION = (
    *("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next", "glm4v", "ernie4_5_vl_moe", "internvl"),
    *("gemma3", "gemma4", "paligemma", "llama4", "phi4_multimodal", "kimi_k25"),
)
STAGES = {
    "before the decoder": ((-1, 0.5), (2, 0.2)),
    "inside": ((0, 0.5), (2, 0.2)),
}
CASES = [(name, stages) for name in ATTENTION for stages in STAGES.values()]
CASES += [(name, ((1, 0.5), (3, 0.2))) for name in HYBRIDS]


@pytest.mark.parametrize("scorer", ["text_guided", "last_token"])
@pytest.mark.parametrize(("name", "stages"), CASES)
def test_one_pass_equals_the_prompt_and_its_answer(
    name: str, stages: tuple[tuple[int, float], ...], scorer: str
) -> None:
    model, inputs, extend, options = family_of(name)
    schedule = schedule_for(model, *stages, scorer=scorer)
    answer, logits, expected = step_by_step(model, inputs, schedule, **options)
    whole = extend(inputs, answer[:, :-1])
    found, record = in_one_pass(model, whole, schedule, STEPS - 1, **options)
    assert kept_of(record) == kept_of(expected)
    bound = rounding_bound(model, whole)
    assert (found - logits).abs().max() < bound


@pytest.mark.parametrize("scorer", ["text_guided", "last_token"])
def test_an_answer_that_is_not_given_as_one_scores_tokens(scorer: str) -> None:
    """The tests above can fail: with the answer among the text queries, other tokens are kept."""
    model, inputs, extend, _ = family_of("llava")
    schedule = schedule_for(model, *STAGES["inside"], scorer=scorer)
    answer, _, expected = step_by_step(model, inputs, schedule)
    with torch.inference_mode(), pruned(model, schedule) as record:
        model(**extend(inputs, answer[:, :-1]), use_cache=False)
    assert kept_of(record) != kept_of(expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("fields", [{"dropped_tokens": "merge"}, {"positions": "renumbered"}], ids=str)
def test_merging_and_renumbering(name: str, fields: dict[str, Any]) -> None:
    model, inputs, extend, _ = family_of(name)
    schedule = schedule_for(model, *STAGES["inside"], **fields)
    answer, logits, expected = step_by_step(model, inputs, schedule)
    whole = extend(inputs, answer[:, :-1])
    found, record = in_one_pass(model, whole, schedule, STEPS - 1)
    assert kept_of(record) == kept_of(expected)
    assert (found - logits).abs().max() < rounding_bound(model, whole)


@pytest.mark.parametrize("scorer", sorted({*SCORERS} - {"text_guided", "last_token", "evs", "vidcom2"}))
def test_every_scorer_keeps_what_the_prompt_alone_keeps(scorer: str) -> None:
    """Those of images; ``evs`` and ``vidcom2`` compare frames and read no text."""
    model, inputs, extend, _ = family_of("qwen2_5_vl")
    schedule = schedule_for(model, (1, 0.5), (3, 0.2), scorer=scorer)
    answer, logits, expected = step_by_step(model, inputs, schedule)
    whole = extend(inputs, answer[:, :-1])
    found, record = in_one_pass(model, whole, schedule, STEPS - 1)
    assert kept_of(record) == kept_of(expected)
    assert (found - logits).abs().max() < rounding_bound(model, whole)


@pytest.mark.filterwarnings("ignore:fast=True. there are no CUDA graphs")
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_static_shapes(name: str) -> None:
    model, inputs, extend, _ = family_of(name)
    schedule = schedule_for(model, *STAGES["inside"])
    answer, logits, expected = step_by_step(model, inputs, schedule)
    whole = extend(inputs, answer[:, :-1])
    found, record = in_one_pass(model, whole, schedule, STEPS - 1, fast=True)
    assert record.fast_prefills == 1
    assert kept_of(record) == kept_of(expected)
    assert (found - logits).abs().max() < rounding_bound(model, whole)


def test_tokens_behind_the_answer_do_not_change_it() -> None:
    """Answers of a batch have unlike lengths: what fills the shorter ones is part of ``answer_length``."""
    model, inputs, extend, _ = family_of("qwen2_5_vl")
    schedule = schedule_for(model, *STAGES["inside"])
    answer, logits, _ = step_by_step(model, inputs, schedule)
    filler = torch.full((len(answer), 3), 7)
    whole = extend(inputs, torch.cat([answer[:, :-1], filler], 1))
    found, _ = in_one_pass(model, whole, schedule, STEPS - 1 + 3)
    assert (found[:, :-3] - logits).abs().max() < rounding_bound(model, whole)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (-1, "at least 0, found -1"),
        (500, "answer_length 500: the prompt has only"),
        (20, "answer_length 20: there are vision tokens among the last positions"),
    ],
)
def test_what_cannot_be_an_answer_is_refused(length: int, message: str) -> None:
    model, inputs, _, _ = family_of("llava")
    with pytest.raises(PruningError, match=message), torch.inference_mode():  # noqa: SIM117
        with pruned(model, schedule_for(model, (1, 0.5)), answer_length=length):
            model(**inputs)
