"""Feature scorers in the runtime, on stock model classes: exact pruning, batches, static shapes, refusals."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning_runtime import PruningError, Record, ScheduleError, find_backbone, pruned
from pruning_runtime.schedule import ScorerChoice
from pruning_runtime.scorers import coverage
from tests.support import rule_references as rules
from tests.support.exactness_a import family_named as family_a
from tests.support.exactness_b import family_named as family_b
from tests.support.greedy import generate
from tests.support.host_reads import check_reads
from tests.support.masked_reference import dropped_positions
from tests.support.own_mask_reference import append_tokens, compacted_logits, find_layers, own_mask_logits
from tests.support.rounding import rounding_bound
from tests.support.schedules import schedule_for
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import FAMILIES, Inputs

NAMES = (
    "llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "llava_next",
    "internvl",
    "gemma3",
    "gemma3n",
    "lfm2_vl",
    "qwen3_5",
)
HYBRID = ("lfm2_vl", "qwen3_5")
BEFORE = ("divprune", "cdpruner", "mmtok", "sparsevlm")
INSIDE = (*BEFORE, "dart", "v2drop")
FIRST, IN_DECODER = ((-1, 0.6), (3, 0.3)), ((1, 0.5), (3, 0.25))


def family_of(name: str) -> Any:
    if name in FAMILIES:
        return FAMILIES[name]
    return family_a(name) if name in FAMILIES_A else family_b(name)


def vision_of(name: str, model: PreTrainedModel, inputs: Inputs) -> Tensor:
    if name in FAMILIES_B:
        return FAMILIES_B[name].vision(inputs)
    return find_backbone(model).vision_mask(inputs["input_ids"])


def options(name: str, inputs: Inputs) -> dict[str, Any]:
    needed = name in FAMILIES_B and FAMILIES_B[name].needs_mask
    return {"vision_mask": FAMILIES_B[name].vision(inputs)} if needed else {}


def kept(model: PreTrainedModel, inputs: Inputs, rule: str, *stages: tuple[int, float], **more: Any) -> Any:
    """Kept positions by stage and row."""
    with pruned(model, schedule_for(model, *stages, scorer=rule), **more) as record, torch.no_grad():
        model(**inputs)
    return [stage.kept_positions() for stage in record.stages]


def expected_logits(
    name: str, model: PreTrainedModel, inputs: Inputs, tokens: Tensor, record: Record | None
) -> Tensor:
    vision = vision_of(name, model, inputs)
    gone = [
        (stage.layer + 1, dropped_positions(inputs, vision, stage.kept_positions()))
        for stage in (record.stages if record else [])
    ]
    run = compacted_logits if name in HYBRID else own_mask_logits
    extend = FAMILIES_B[name].extend if name in FAMILIES_B else append_tokens
    return run(model, inputs, tokens, gone, extend=extend)


CASES = [
    *(
        (name, rule, FIRST)
        for name in NAMES
        for rule in BEFORE
        if not (name in HYBRID and rule == "sparsevlm")
    ),
    *((name, rule, IN_DECODER) for name in NAMES for rule in INSIDE),
]


@pytest.mark.parametrize(
    ("name", "rule", "stages"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2][0][0]}") for case in CASES],
)
def test_a_pruned_run_equals_the_masked_sequence(
    name: str, rule: str, stages: tuple[tuple[int, float], ...]
) -> None:
    family = family_of(name)
    model, inputs = family.build(), family.batch((2, 1, 0))
    layers = find_backbone(model)
    if name in HYBRID and not all(layers.has_own_attention(layer) for layer, _ in stages if layer >= 0):
        stages = tuple((layer if layer < 0 else layer - layer % 2 + 1, ratio) for layer, ratio in stages)
    with pruned(model, schedule_for(model, *stages, scorer=rule), **options(name, inputs)) as record:
        tokens, logits = generate(model, inputs, steps=3)
    assert [stage.scorer for stage in record.stages] == [rule, rule]
    assert (logits - expected_logits(name, model, inputs, tokens, record)).abs().max() < rounding_bound(
        model, inputs
    )
    unpruned = expected_logits(name, model, inputs, tokens, None)
    assert (logits - unpruned)[:2].abs().amax((1, 2)).min() > 0.01
    for stage in record.stages:
        assert [len(row) for row in stage.kept_positions()] == list(stage.keep)


# ---- what is kept, against the references on the inputs of the decoder


def decoder_inputs(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """The hidden states that reach decoder layer 0, ``[batch, length, width]``."""
    found: list[Tensor] = []

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    handle = find_layers(model)[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    return found[0]


def by_reference(rule: str, vision: np.ndarray, text: np.ndarray, keep: int) -> list[int]:
    if rule == "cdpruner":
        return sorted(rules.cdpruner(vision, text, keep)[0])
    objective = rules.divprune(vision) if rule == "divprune" else rules.mmtok(vision, text)
    return sorted(rules.greedy(objective, len(vision), keep))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
@pytest.mark.parametrize("rule", ["divprune", "cdpruner", "mmtok"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "lfm2_vl"])
def test_before_the_decoder_the_reference_s_tokens_are_kept(name: str, rule: str, dtype: Any) -> None:
    """One image a row. Whatever the model's type, similarities are float32 and the tokens the same."""
    family = family_of(name)
    model, inputs = family.build(), family.batch((1, 1))
    if dtype == torch.bfloat16:
        model = model.to(dtype)
        inputs = {
            key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()
        }
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        states = decoder_inputs(model, inputs).double().numpy()
        found = kept(model, inputs, rule, (-1, 0.5))[0]
    vision = vision_of(name, model, inputs)
    for row, positions in enumerate(found):
        places = vision[row].nonzero()[:, 0].numpy()
        text = states[row, places.max() + 1 :]
        chosen = by_reference(rule, states[row, places], text, len(positions))
        assert positions == places[chosen].tolist()


@pytest.mark.parametrize("rule", ["divprune", "cdpruner", "mmtok", "vidcom2"])
def test_images_keep_the_same_tokens_in_another_order(rule: str) -> None:
    """Gemma 3's tower sees each image alone, so exchanged images exchange their kept tokens."""
    model, inputs = FAMILIES_B["gemma3"].build(), FAMILIES_B["gemma3"].batch((2,))
    swapped = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    places = vision_of("gemma3", model, inputs)[0].nonzero()[:, 0].tolist()
    first, second = (kept(model, given, rule, (-1, 0.5))[0][0] for given in (inputs, swapped))
    images = {position: (slot // 16, slot % 16) for slot, position in enumerate(places)}
    exchanged = sorted((1 - images[position][0], images[position][1]) for position in second)
    assert exchanged == sorted(images[position] for position in first)


# Only Gemma 3 puts more than one token between the images of these prompts, which makes frames of them.
WITH_FRAMES = [("gemma3", rule) for rule in ("vidcom2", "evs")]


@pytest.mark.parametrize(
    ("name", "rule"),
    [*((name, rule) for name in ("llava", "internvl", "gemma3") for rule in INSIDE), *WITH_FRAMES],
)
def test_a_batch_keeps_what_each_row_keeps_alone(name: str, rule: str) -> None:
    family = family_of(name)
    model, inputs = family.build(), family.batch((2, 3))
    # As `generate` counts them: keys, which DART reads, depend on positions.
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    stages = FIRST if rule in BEFORE else ((1, 0.4),)
    together = kept(model, inputs, rule, *stages)
    per_image = len(inputs["pixel_values"]) // 5
    for row, images in enumerate((slice(0, 2), slice(2, 5))):
        padding = int((inputs["attention_mask"][row] == 0).sum())
        alone = {
            key: value[row : row + 1, padding:]
            if key != "pixel_values"
            else value[images.start * per_image : images.stop * per_image]
            for key, value in inputs.items()
        }
        found = kept(model, alone, rule, *stages)
        for stage, both in zip(found, together, strict=True):
            assert [position + padding for position in stage[0]] == both[row]


@pytest.mark.parametrize(
    ("name", "rule"), [*((name, rule) for name in ("llava", "gemma3") for rule in INSIDE), *WITH_FRAMES]
)
def test_the_static_path_keeps_the_same_tokens(name: str, rule: str) -> None:
    family = family_of(name)
    model, inputs = family.build(), family.batch((3, 2))
    stages = FIRST if rule in BEFORE else IN_DECODER if rule in INSIDE else ((-1, 0.5),)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fast=True: there are no CUDA graphs")
        schedule = schedule_for(model, *stages, scorer=rule)
        with pruned(model, schedule, fast=True) as record, torch.inference_mode():
            model(**inputs)
    assert record.fast_prefills == 1
    assert [stage.kept_positions() for stage in record.stages] == kept(model, inputs, rule, *stages)


@pytest.mark.parametrize("rule", INSIDE)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_nothing_is_read_after_the_plan(name: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "READS_ARE_FREE", ())  # as on a GPU
    family = family_of(name)
    model, inputs = family.build(), family.batch((2, 1, 0))
    check_reads(model, inputs, *IN_DECODER, scorer=rule)
    if rule in BEFORE:
        check_reads(model, inputs, *FIRST, scorer=rule)


@pytest.mark.parametrize("rule", ["vidcom2", "evs"])
def test_frame_rules_read_nothing_after_the_plan(rule: str) -> None:
    family = FAMILIES["qwen2_vl"]
    check_reads(family.build(), family.batch((2, 3, 0)), (-1, 0.5), scorer=rule)


# ---- frames


@pytest.mark.parametrize("rule", ["vidcom2", "evs"])
def test_frames_of_one_run_are_told_by_their_length(rule: str) -> None:
    """Qwen2.5-VL's video is one run of vision tokens; InternVL's images are frames by themselves."""
    family = FAMILIES["qwen2_5_vl"]
    model, inputs = family.build(), family.batch((0,), videos_per_row=(1,))
    frames = int(inputs["video_grid_thw"][0, 0])
    places = vision_of("qwen2_5_vl", model, inputs)[0].nonzero()[:, 0].numpy()
    assert frames > 1
    length = len(places) // frames
    schedule = schedule_for(model, (-1, 0.6))
    schedule = schedule.model_copy(
        update={"scorer": ScorerChoice(name=rule, options={"frame_tokens": length})}
    )
    with pruned(model, schedule) as record, torch.no_grad():
        model(**inputs)
    found = record.stages[0].kept_positions()[0]
    states = decoder_inputs(model, inputs)[0].double().numpy()[places]
    chosen = (
        rules.vidcom2(states, length, len(found))
        if rule == "vidcom2"
        else rules.best(rules.evs(states, length), len(found))
    )
    assert found == places[chosen].tolist()


def refused(error: type[Exception], model: PreTrainedModel, inputs: Inputs, scorer: Any, *stages: Any) -> str:
    schedule = schedule_for(model, *stages).model_copy(update={"scorer": ScorerChoice(**scorer)})
    with pytest.raises(error) as found, pruned(model, schedule), torch.no_grad():
        model(**inputs)
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("rule", ["dart", "v2drop"])
def test_rules_of_a_decoder_layer_are_refused_before_the_decoder(rule: str) -> None:
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch((1,))
    message = refused(ScheduleError, model, inputs, {"name": rule}, (-1, 0.5))
    assert f"scorer '{rule}' reads a decoder layer" in message


@pytest.mark.parametrize("rule", ["cdpruner", "mmtok", "dart", "sparsevlm"])
def test_rules_that_read_text_are_refused_without_it(rule: str) -> None:
    model = FAMILIES["llava"].build()
    inputs = FAMILIES["llava"].batch((1, 1))
    end = int(vision_of("llava", model, inputs)[0].nonzero().max()) + 1
    cut = {key: value[:1, :end] if value.dim() == 2 else value[:1] for key, value in inputs.items()}
    message = refused(PruningError, model, cut, {"name": rule}, (1, 0.5))
    assert (
        f"scorer '{rule}' compares vision tokens with the text after them, and row 0 has no text" in message
    )


@pytest.mark.parametrize(
    ("options", "rows", "stages", "error", "match"),
    [
        (
            {"frame_tokens": 5},
            (2,),
            [(-1, 0.5)],
            PruningError,
            "frame_tokens 5, which does not divide a video of row 0",
        ),
        (
            {"frame_tokens": 16},
            (2,),
            [(-1, 0.5)],
            PruningError,
            "needs 2 frames or more, and a video of row 0",
        ),
        ({}, (2, 1), [(-1, 0.5)], PruningError, "needs 2 frames or more, and a video of row 1 has fewer"),
        (
            {},
            (2,),
            [(-1, 0.5), (2, 0.2)],
            ScheduleError,
            "tokens have left before layer 2; use it at the first stage",
        ),
    ],
)
def test_what_is_no_video_is_refused(
    options: dict[str, int], rows: tuple[int, ...], stages: Any, error: type[Exception], match: str
) -> None:
    model, inputs = FAMILIES["qwen2_vl"].build(), FAMILIES["qwen2_vl"].batch(rows)
    assert match in refused(error, model, inputs, {"name": "evs", "options": options}, *stages)


def test_images_of_unlike_sizes_are_no_frames() -> None:
    family = family_a("glm4v")
    model, inputs = family.build(), family.batch((2,))
    message = refused(PruningError, model, inputs, {"name": "vidcom2"}, (-1, 0.5))
    assert "takes every image of a row as a frame, and those of row 0 differ in size" in message
