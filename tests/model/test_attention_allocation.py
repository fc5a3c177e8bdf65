"""Shares of attention on text, vision tokens, question and answer, against eager attention over the same tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pruning_runtime import find_backbone
from schedule_finder.errors import InputError
from schedule_finder.evaluation import allocation
from schedule_finder.evaluation.allocation import attention_allocation, write_allocation
from schedule_finder.evaluation.allocation_table import COLUMNS, KEYS, QUERIES, read_allocation
from schedule_finder.measuring.own_answers import with_answers
from tests.support.eager_scores import eager_maps
from tests.support.tiny_models import FAMILIES

ANSWERS = [[7, 8, 9], [5], [6, 4]]


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_eager_attention(family: str) -> None:
    tiny = FAMILIES[family]
    inputs = tiny.batch((1, 2, 1))
    backbone = find_backbone(tiny.build())
    shares, counts = attention_allocation(backbone, inputs, ANSWERS)
    whole = with_answers(backbone, inputs, ANSWERS)
    maps = eager_maps(family, whole)
    prompt = inputs["input_ids"].shape[1]
    for row, answer in enumerate(ANSWERS):
        vision = backbone.vision_mask(inputs["input_ids"])[row].nonzero().flatten().tolist()
        text = [at for at in inputs["attention_mask"][row].nonzero().flatten().tolist() if at not in vision]
        given = list(range(prompt, prompt + len(answer) - 1))
        keys = {
            "system": [at for at in text if at < vision[0]],
            "vision": vision,
            "question": [at for at in text if at > vision[0]],
            "answer": given,
        }
        queries = {"question": keys["question"], "answer": [prompt - 1, *given]}
        assert counts[row].tolist() == [len(keys[name]) for name in KEYS]
        for layer, layer_maps in enumerate(maps):
            for which, name in enumerate(QUERIES):
                rows = layer_maps[row][:, queries[name]].double().numpy()
                expected = [rows[:, :, keys[key]].sum(2).mean() for key in KEYS]
                np.testing.assert_allclose(shares[row, layer, which], expected, atol=1e-5)
    assert shares[1, :, 1, KEYS.index("answer")].tolist() == [0.0] * len(maps)  # an answer of one token


class Loaded(SimpleNamespace):
    """A tiny backbone whose samples are rows of a batch."""

    def inputs(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        return FAMILIES["llava"].batch((1,) * len(samples))


def test_the_table_is_written_once_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "5_allocation.csv"
    loaded: Any = Loaded(backbone=find_backbone(FAMILIES["llava"].build()), device=torch.device("cpu"))
    samples: Any = [SimpleNamespace(id="b"), SimpleNamespace(id="007")]
    write_allocation(path, loaded, samples, 3)
    table = read_allocation(path)
    assert list(table) == list(COLUMNS)
    assert table.id.unique().tolist() == ["b", "007"]
    assert len(table) == 2 * loaded.backbone.shape.num_layers * len(QUERIES)
    monkeypatch.setattr(allocation, "greedy_answers", None)  # a second call measures nothing
    write_allocation(path, loaded, samples, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop(columns="vision"), "not readable"),
        (lambda table: table.assign(vision=2.0), "must add up to 1"),
        (lambda table: table.assign(vision="much"), "not readable"),
        (lambda table: table.iloc[:0], "must add up to 1"),
    ],
)
def test_a_damaged_table_is_an_input_error(tmp_path: Path, change: Any, message: str) -> None:
    rows = [("a", 0, "answer", 0.25, 0.25, 0.25, 0.25, 1, 1, 1, 1)]
    change(pd.DataFrame(rows, columns=list(COLUMNS))).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(InputError, match=message):
        read_allocation(tmp_path / "t.csv")
