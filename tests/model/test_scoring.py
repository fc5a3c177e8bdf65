"""Scores and kept tokens against the formulas, from the model's own eager attention."""

from __future__ import annotations

import pytest
import torch

from pruning_runtime import find_backbone, pruned
from pruning_runtime.attention_rows import attention_rows, find_text_queries, padded_indices
from pruning_runtime.attention_tap import AttentionInputs, attention_tap
from tests.support.eager_scores import eager_maps, expected_scores
from tests.support.schedules import schedule_for
from tests.support.tiny_models import FAMILIES


@pytest.mark.parametrize("rule", ["text_guided", "uniform_text", "last_token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_tokens_are_the_best_by_the_formula(family: str, rule: str) -> None:
    tiny = FAMILIES[family]
    model, inputs = tiny.build(), tiny.batch((2, 1, 0))
    vision = find_backbone(model).vision_mask(inputs["input_ids"])
    maps = eager_maps(family, inputs)
    for layer in (0, 2):
        scores = expected_scores(rule, maps[layer], vision, inputs["attention_mask"].bool())
        schedule = schedule_for(model, (layer, 0.3), scorer=rule)
        with pruned(model, schedule, keep_scores=True) as record, torch.no_grad():
            model(**inputs)
        (stage,) = record.stages
        for row, kept in enumerate(stage.kept_positions()):
            seen = vision[row].nonzero()[:, 0]
            torch.testing.assert_close(stage.scores[row, seen].double(), scores[row], atol=1e-5, rtol=1e-5)
            best = seen[scores[row].argsort(descending=True)[: len(kept)]]
            assert kept == sorted(best.tolist())
            assert len(kept) == round(0.3 * len(seen))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk_bytes", [1, 20_000, 1 << 30])
def test_rows_beside_the_kernel_equal_eager_attention(family: str, attention: str, chunk_bytes: int) -> None:
    tiny = FAMILIES[family]
    model, inputs = tiny.build(attention=attention), tiny.batch((2, 1, 0))
    backbone = find_backbone(model)
    maps = eager_maps(family, inputs)
    valid = inputs["attention_mask"].bool()
    text_queries = find_text_queries(backbone.vision_mask(inputs["input_ids"]), valid)
    rows, real = padded_indices(text_queries, int(text_queries.sum(1).max()))
    seen: dict[int, float] = {}

    def compare(call: AttentionInputs) -> None:
        blocks = attention_rows(
            call.query, call.key, rows, real, call.mask, call.scaling, chunk_bytes=chunk_bytes
        )
        found = torch.cat(list(blocks), 1)
        expected = maps[call.layer].gather(2, rows[:, None, :, None].expand(-1, 6, -1, maps[0].shape[3]))
        expected = expected * real[:, None, :, None]
        seen[call.layer] = float((found - expected).abs().max())

    with attention_tap(backbone, compare), torch.no_grad():
        model(**inputs)
    assert sorted(seen) == list(range(len(backbone.layers)))
    assert max(seen.values()) < 1e-5


def test_random_tokens_differ_between_prefills_and_repeat_with_the_seed() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1,))
    schedule = schedule_for(model, (1, 0.3), scorer="random")

    def two_prefills() -> list[list[list[int]]]:
        kept = []
        with pruned(model, schedule) as record, torch.no_grad():
            for _ in range(2):
                model(**inputs)
                kept.append(record.stages[0].kept_positions())
        return kept

    first, again = two_prefills(), two_prefills()
    assert first == again
    assert first[0] != first[1]
