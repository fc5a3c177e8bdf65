"""Finished units come back exactly, whatever a killed process left in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from schedule_finder.measuring.unit_store import UnitStore, inputs_digest, weights_digest

CONTEXT = {"weights": "abc"}


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_results_come_back_bit_by_bit_in_another_process(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=50).astype(np.float32).tolist()
    values += [float("nan"), 5e-324, 1 / 3]
    store = UnitStore(tmp_path / "units", CONTEXT)
    store.put({"layer": 1, "ratio": 0.1}, values)
    again = UnitStore(tmp_path / "units", CONTEXT)
    assert np.array(again.get({"ratio": 0.1, "layer": 1})).tobytes() == np.array(values).tobytes()
    assert again.get({"layer": 1, "ratio": 0.2}) is None


def test_a_line_that_was_cut_off_is_lost_alone(tmp_path: Path) -> None:
    store = UnitStore(tmp_path, CONTEXT)
    for number in range(3):
        store.put(number, [number])
    path = only_file(tmp_path)
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1]) + 1):
        path.write_bytes(whole[:-cut])
        after = UnitStore(tmp_path, CONTEXT)
        assert [after.get(number) for number in range(2)] == [[0], [1]]
        assert after.get(2) in (None, [2])  # only the line break may be missing
        after.put(3, [3])
        again = UnitStore(tmp_path, CONTEXT)
        assert [again.get(number) for number in (0, 1, 3)] == [[0], [1], [3]]


def test_another_context_has_no_results_of_this_one(tmp_path: Path) -> None:
    UnitStore(tmp_path, CONTEXT).put("key", 1)
    assert UnitStore(tmp_path, {"weights": "abd"}).get("key") is None
    assert UnitStore(tmp_path, CONTEXT).get("key") == 1


def test_without_a_folder_nothing_is_kept() -> None:
    store = UnitStore(None, CONTEXT)
    store.put("key", 1)
    assert store.get("key") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_known_by_its_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 2)).to(dtype)
    before = weights_digest(model)
    assert weights_digest(model) == before
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    changed = weights_digest(model)
    assert changed != before
    with torch.no_grad():
        model[1].bias[1] += 1
    assert weights_digest(model) not in (before, changed)


def test_a_batch_is_known_by_all_its_values() -> None:
    inputs = {"input_ids": torch.arange(6).reshape(2, 3), "pixel_values": torch.rand(2, 4).bfloat16()}
    before = inputs_digest(inputs)
    assert inputs_digest(dict(reversed(inputs.items()))) == before
    for name in inputs:
        changed = {key: value.clone() for key, value in inputs.items()}
        changed[name][1, 2] += 1
        assert inputs_digest(changed) != before
    assert inputs_digest(inputs | {"input_ids": inputs["input_ids"].reshape(3, 2)}) != before
