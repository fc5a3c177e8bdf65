"""Models that accelerate has spread over devices: on this machine a cpu and a disk.

Layers on the disk have no parameters but while they run, their `forward` is accelerate's, and what they are
given is moved by it after the runtime's hooks have had it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from pruning_runtime import Schedule, pruned
from pruning_runtime.sequence import PrunedPrompt, Segment
from tests.support.dispatching import device_map, dispatched
from tests.support.model_state import state_of
from tests.support.schedules import schedule_for
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import FAMILIES, LAYERS, Inputs

pytest.importorskip("accelerate")

STAGES = ((0, 0.5), (2, 0.2))


def generate(model: PreTrainedModel, schedule: Schedule, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Greedy tokens and logits of the pruned model."""
    with pruned(model, schedule, timing=True) as record, torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert len(record.stages) == len(STAGES)
    return output.sequences, torch.stack(output.logits, 1)


@pytest.mark.parametrize("options", [{}, {"offload_buffers": True}], ids=["", "buffers too"])
@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_dispatching_changes_no_bit(
    name: str, attention: str, positions: str, options: dict[str, Any], tmp_path: Path
) -> None:
    tiny = FAMILIES[name]
    inputs, whole = tiny.batch((2, 1, 0)), tiny.build(attention=attention)
    schedule = schedule_for(whole, *STAGES, positions=positions)
    expected = generate(whole, schedule, inputs)
    spread = dispatched(tiny.build(attention=attention), tmp_path, **options)
    assert {parameter.device.type for parameter in spread.get_decoder().layers.parameters()} == {
        "cpu",
        "meta",
    }
    found = generate(spread, schedule, inputs)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    # A second time, after everything of the first has been taken away again.
    assert torch.equal(generate(spread, schedule, inputs)[1], expected[1])


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_only_accelerates_own_hooks_stay(name: str, tmp_path: Path) -> None:
    tiny = FAMILIES[name]
    model, inputs = dispatched(tiny.build(), tmp_path), tiny.batch((1,))
    with torch.no_grad():
        unpruned = model(**inputs).logits
    hooks = {part: module._hf_hook for part, module in model.named_modules() if hasattr(module, "_hf_hook")}
    assert len(hooks) > LAYERS
    before = copy.deepcopy(state_of(model))
    with pruned(model, schedule_for(model, *STAGES)), torch.no_grad():
        assert state_of(model) != before
        assert not torch.equal(model(**inputs).logits, unpruned)
        with pytest.raises(IndexError):
            model(input_ids=inputs["input_ids"] + 1000)
    assert state_of(model) == before
    after = {part: module._hf_hook for part, module in model.named_modules() if hasattr(module, "_hf_hook")}
    assert after == hooks
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, unpruned)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_loaded_with_a_device_map(name: str, tmp_path: Path) -> None:
    tiny = FAMILIES[name]
    whole, inputs = tiny.build(), tiny.batch((2, 1))
    whole.save_pretrained(tmp_path / "model")
    loaded = (
        type(whole)
        .from_pretrained(
            tmp_path / "model", device_map=device_map(whole), offload_folder=tmp_path / "offload"
        )
        .eval()
    )
    assert "disk" in loaded.hf_device_map.values()
    schedule = schedule_for(whole, *STAGES)
    schedule = schedule.model_copy(update={"backbone": schedule_for(loaded, *STAGES).backbone})
    for found, expected in zip(
        generate(loaded, schedule, inputs), generate(whole, schedule, inputs), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["deepstack", "layers that share keys"])
def test_features_between_layers_and_shared_keys(name: str, tmp_path: Path) -> None:
    """Two of the runtime's special cases, whose tensors come from another layer than the one that runs."""
    tiny: Any = FAMILIES_A["qwen3_vl"] if name == "deepstack" else FAMILIES_B["gemma4"]
    inputs, whole = tiny.batch((2, 1)), tiny.build()
    schedule = schedule_for(whole, *STAGES)
    spread = dispatched(tiny.build(), tmp_path)
    try:
        with torch.no_grad():
            spread(**inputs)
    except KeyError:
        # accelerate hands layers copies of a dict that they should share; later releases provide for it.
        pytest.skip(f"transformers {transformers.__version__} cannot dispatch this model, pruned or not")
    expected, found = generate(whole, schedule, inputs), generate(spread, schedule, inputs)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_copy_on_another_device_is_made_once() -> None:
    """Layers tell by identity whether keys are those of their own tokens."""
    index = torch.arange(3)[None]
    prompt = PrunedPrompt(3, [Segment(index, index >= 0, padded=False)], {0: 0, 1: 0})
    elsewhere = torch.device("meta")
    assert prompt.of(0, elsewhere) is prompt.of(1, elsewhere)
    assert prompt.of(0, elsewhere).index.device == elsewhere
    assert prompt.of(0, index.device) is prompt.segments[0]


def test_the_fast_path_is_left_to_models_in_one_place(tmp_path: Path) -> None:
    tiny = FAMILIES["llava"]
    model = dispatched(tiny.build(), tmp_path)
    schedule = schedule_for(model, *STAGES)
    with (
        pytest.warns(UserWarning, match="several devices or offloaded"),
        pruned(model, schedule, fast=True) as record,
        torch.no_grad(),
    ):
        model(**tiny.batch((1,)))
    assert (record.prefills, record.fast_prefills) == (1, 0)
