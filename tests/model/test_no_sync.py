"""After the plan nothing waits for the device: pruning reads three counts per row before the decoder, and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.exactness_a import family_named
from tests.support.host_reads import check_reads, host_reads
from tests.support.tiny_models import FAMILIES

ROWS = (2, 1, 0)
STAGES = ((0, 0.5), (2, 0.2))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_reads_its_counts_and_nothing_else(family: str, attention: str) -> None:
    tiny = FAMILIES[family]
    check_reads(tiny.build(attention=attention), tiny.batch(ROWS), *STAGES)


@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("scorer", ["strided", "random", "last_token", "uniform_text"])
def test_no_rule_and_no_numbering_reads_more(scorer: str, positions: str) -> None:
    tiny = FAMILIES["qwen2_vl"]
    first = -1 if scorer in ("strided", "random") else 0
    stages = (first, 0.5), (2, 0.2)
    check_reads(tiny.build(), tiny.batch(ROWS), *stages, scorer=scorer, positions=positions)


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl", "granite4_vision", "mistral3"])
def test_separators_and_deepstack_read_nothing(name: str) -> None:
    family = family_named(name)
    check_reads(family.build(), family.batch(ROWS), *STAGES)


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
