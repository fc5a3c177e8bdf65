"""After the plan nothing waits for the device: pruning reads three counts per row before the decoder, and no more."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pruning_runtime import find_backbone, pruned
from tests.model.test_families_a import family_named
from tests.support.host_reads import Read, host_reads
from tests.support.schedules import schedule_for
from tests.support.tiny_models import FAMILIES, Inputs

ROWS = (2, 1, 0)
PLAN: Counter[Read] = Counter({("before", "tolist"): 1})
STAGES = ((0, 0.5), (2, 0.2))


def reads_of(model: PreTrainedModel, inputs: Inputs) -> tuple[Counter[Read], Counter[Read]]:
    """Reads of a prompt with all its logits, and of a prompt with two tokens generated behind it."""
    with torch.no_grad():
        with host_reads(model) as prompt:
            model(**inputs)
        with host_reads(model) as generated:
            model.generate(
                **inputs,
                max_new_tokens=3,
                min_new_tokens=3,
                do_sample=False,
                suppress_tokens=list(find_backbone(model).vision_token_ids),
            )
    return prompt, generated


def check(model: PreTrainedModel, inputs: Inputs, *stages: tuple[int, float], **schedule: Any) -> None:
    """Compare the reads of pruned calls with those of the model itself."""
    unpruned = reads_of(model, inputs)
    with pruned(model, schedule_for(model, *stages, **schedule), keep_scores=True) as record:
        found = reads_of(model, inputs)
    assert [stage.layer for stage in record.stages] == [layer for layer, _ in stages]
    for more, fewer in zip(found, unpruned, strict=True):
        assert more - fewer == PLAN


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_reads_its_counts_and_nothing_else(family: str, attention: str) -> None:
    tiny = FAMILIES[family]
    check(tiny.build(attention=attention), tiny.batch(ROWS), *STAGES)


@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("scorer", ["strided", "random", "last_token", "uniform_text"])
def test_no_rule_and_no_numbering_reads_more(scorer: str, positions: str) -> None:
    tiny = FAMILIES["qwen2_vl"]
    first = -1 if scorer in ("strided", "random") else 0
    stages = (first, 0.5), (2, 0.2)
    check(tiny.build(), tiny.batch(ROWS), *stages, scorer=scorer, positions=positions)


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl", "granite4_vision", "mistral3"])
def test_separators_and_deepstack_read_nothing(name: str) -> None:
    family = family_named(name)
    check(family.build(), family.batch(ROWS), *STAGES)


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor.tolist(),
        lambda tensor: bool(tensor.any()),
        lambda tensor: int(tensor.sum()),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: torch.equal(tensor, tensor),
        lambda tensor: torch.unique(tensor),
        lambda tensor: tensor.cpu(),
    ],
)
def test_reads_in_a_layer_are_noticed(read: Any) -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1,))
    model.get_decoder().layers[3].register_forward_pre_hook(lambda _module, args: (read(args[0]), None)[1])
    with host_reads(model) as counts, torch.no_grad():
        model(**inputs)
    assert any(when == "decoder" for when, _ in counts)
