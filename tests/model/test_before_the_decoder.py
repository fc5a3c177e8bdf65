"""Attention scorers before the decoder: layer 0's own scores, and the tokens are gone before it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_runtime import ScheduleError, find_backbone, pruned
from pruning_runtime.costs import budget_of
from tests.support import exactness_a, exactness_b, greedy
from tests.support.fast_path import check as check_fast
from tests.support.host_reads import host_reads
from tests.support.rounding import rounding_bound
from tests.support.schedules import schedule_for
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import FAMILIES, Inputs

ROWS = (2, 1, 0)
# Hybrids begin with a recurrent layer.
ATTENDING = [*FAMILIES, *(name for name, family in FAMILIES_A.items() if not family.recurrent)]
KERNELS = [(name, kernel) for name in ATTENDING for kernel in ("sdpa", "eager")] + [
    (name, kernel) for name, family in FAMILIES_B.items() for kernel in family.kernels
]
SCORE_ROUNDING = 64 * torch.finfo(torch.float32).eps
"""Share of the largest score. Each score is a sum of a few hundred shares of attention in float32, all positive."""
LOOKING = ((-1, 0.5), (2, 0.2))


def model_and_inputs(name: str, **options: Any) -> tuple[PreTrainedModel, Inputs, Tensor | None]:
    """A family's model, a batch, and the vision mask that `pruned` needs for it."""
    if name in FAMILIES_B:
        family = exactness_b.family_named(name)
        inputs = family.batch()
        return family.build(**options), inputs, exactness_b.given_mask(family, inputs)
    tiny = FAMILIES.get(name) or exactness_a.family_named(name)
    return tiny.build(**options), tiny.batch(ROWS), None


@pytest.mark.parametrize(("name", "attention"), KERNELS)
def test_the_scores_are_those_of_layer_0(name: str, attention: str) -> None:
    """To rounding what a stage behind layer 0 sees; the layer itself then runs on the kept tokens alone."""
    model, inputs, mask = model_and_inputs(name, attention=attention)
    stages = []
    for layer in (0, -1):
        with pruned(model, schedule_for(model, (layer, 0.4)), vision_mask=mask, keep_scores=True) as record:
            greedy.generate(model, inputs, steps=2)
        stages.append(record.stages[0])
    behind, before = stages
    assert before.layer == -1
    assert before.kept_positions() == behind.kept_positions()
    assert before.scores is not None
    assert behind.scores is not None
    # Bit by bit with vector instructions; without them, kernels take other paths for other memory addresses.
    assert (before.scores - behind.scores).abs().max() < SCORE_ROUNDING * behind.scores.abs().max()
    assert record.vision_tokens_per_layer[0] == list(before.keep)


@pytest.mark.parametrize("name", ATTENDING)
def test_generation_equals_the_reference(name: str) -> None:
    model, inputs, _ = model_and_inputs(name)
    family = FAMILIES_A.get(name) or FAMILIES_A["internvl"]  # whose reference serves all that only attend
    exactness_a.check(family, model, inputs, schedule_for(model, *LOOKING))


@pytest.mark.parametrize("name", FAMILIES_B)
def test_generation_equals_the_reference_b(name: str) -> None:
    model, inputs, mask = model_and_inputs(name)
    family = FAMILIES_B[name]
    with pruned(model, schedule_for(model, *LOOKING), vision_mask=mask) as record:
        tokens, logits = exactness_b.generate(model, inputs)
    expected = exactness_b.reference(family, model, inputs, tokens, record)
    assert (logits - expected).abs().max() < rounding_bound(model, inputs)


@pytest.mark.parametrize("fields", [{}, {"dropped_tokens": "merge"}, {"scorer": "last_token"}])
@pytest.mark.parametrize("rows", [ROWS, (1,)])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_on_the_fast_path(name: str, rows: tuple[int, ...], fields: dict[str, Any]) -> None:
    tiny = FAMILIES[name]
    model = tiny.build()
    check_fast(model, tiny.batch(rows), schedule_for(model, *LOOKING, **fields))


def test_nothing_enters_a_cache_or_is_read_on_the_host() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch(ROWS)
    with torch.no_grad():
        with host_reads(model) as unpruned:
            model(**inputs)
        with pruned(model, schedule_for(model, *LOOKING)) as record, host_reads(model) as counts:
            output = model(**inputs)
    assert counts - unpruned == {("before", "tolist"): 1}
    widths = [layer.keys.shape[2] for layer in output.past_key_values.layers]
    assert widths == [max(row) for row in record.tokens_per_layer]


@pytest.mark.parametrize(
    ("scorer", "pre_decoder"), [("text_guided", True), ("last_token", True), ("strided", False)]
)
def test_the_record_is_charged_as_the_budget_is(scorer: str, pre_decoder: bool) -> None:
    """16 vision tokens, of which 8 and 4 are whole numbers."""
    tiny = FAMILIES["llava"]
    model = tiny.build()
    schedule = schedule_for(model, (-1, 0.5), (2, 0.25), scorer=scorer)
    with pruned(model, schedule, timing=True) as record:
        greedy.generate(model, tiny.batch((1,)), steps=1)
    shape = find_backbone(model).shape
    budget = budget_of(schedule.stages, shape, 16, 11, pre_decoder=pre_decoder)
    assert record.processed == pytest.approx(budget.processed, abs=1e-12)
    assert ("scoring" in record.milliseconds) is pre_decoder
    free = budget_of(schedule.stages, shape, 16, 11)
    assert (budget.processed > free.processed) is pre_decoder


def test_a_stage_that_drops_nothing_is_not_looked_at() -> None:
    tiny = FAMILIES["llava"]
    model = tiny.build()
    with pruned(model, schedule_for(model, (-1, 1.0), (2, 0.5)), timing=True) as record:
        greedy.generate(model, tiny.batch((1,)), steps=1)
    assert [stage.layer for stage in record.stages] == [2]
    assert record.processed == pytest.approx((3 + 3 * 0.5) / 6)


def test_a_recurrent_first_layer_is_refused() -> None:
    family = exactness_a.family_named("lfm2_vl")
    model = family.build()
    with (
        pytest.raises(ScheduleError, match="layer 0 .* has no keys of its own"),
        pruned(model, schedule_for(model, (-1, 0.5))),
    ):
        pass
