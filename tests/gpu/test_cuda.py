"""Pruning on a GPU: exact, without waiting for the device, over two devices, timed.

`make test-gpu` runs these. GPU_TESTS_ON=cpu runs the same code without a GPU, as far as it goes, to see that the
tests themselves are sound.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from pruning_runtime import Record, find_backbone, pruned
from tests.support import greedy
from tests.support.dispatching import device_map
from tests.support.masked_reference import dropped_positions, masked_logits
from tests.support.on_gpu import DEVICE, GPU_MARKS, ON_GPU, build
from tests.support.schedules import schedule_for
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_models import FAMILIES, Inputs

pytestmark = GPU_MARKS

ROWS = (2, 1, 0)
STAGES = ((0, 0.5), (2, 0.2))
STEPS = 5
FLOAT32_TOLERANCE = 1e-4
# Logits here reach 4, where neighbouring bfloat16 numbers lie 2**-6 apart, and each of six layers rounds several
# times. On a CPU the worst difference is 2**-4.
BFLOAT16_TOLERANCE = 2.0**-3


@pytest.fixture(autouse=True)
def whole_float32() -> Iterator[None]:
    """TF32 off: it has ten bits of mantissa."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def on_device(inputs: Inputs, dtype: torch.dtype = torch.float32) -> Inputs:
    """The batch on the device, its pixels in the model's precision."""
    return {
        name: value.to(DEVICE, dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }


generate = functools.partial(greedy.generate, steps=STEPS, suppress_tokens=None)


def reference(model: PreTrainedModel, inputs: Inputs, tokens: Tensor, record: Record) -> Tensor:
    """The masked run; what was dropped is read off the record."""
    vision = find_backbone(model).vision_mask(inputs["input_ids"])
    dropped = [
        (stage.layer + 1, dropped_positions(inputs, vision, stage.kept_positions()))
        for stage in record.stages
    ]
    return masked_logits(model, inputs, tokens, dropped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_masking(family: str, attention: str, dtype: torch.dtype) -> None:
    model = build(family, dtype, attention=attention)
    inputs = on_device(FAMILIES[family].batch(ROWS), dtype)
    with pruned(model, schedule_for(model, *STAGES)) as record:
        tokens, logits = generate(model, inputs)
    expected = reference(model, inputs, tokens, record)
    tolerance = FLOAT32_TOLERANCE if dtype is torch.float32 else BFLOAT16_TOLERANCE
    assert (logits.float() - expected.float()).abs().max() <= tolerance
    # The same tokens, but where two are closer to each other than rounding lets them be told apart.
    best = expected.float().topk(2).values
    clear = best[..., 0] - best[..., 1] > 2 * tolerance
    assert clear.any()
    assert torch.equal(expected.argmax(-1)[clear], tokens[clear])


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_no_bit(family: str) -> None:
    model, inputs = build(family), on_device(FAMILIES[family].batch(ROWS))
    expected = generate(model, inputs)
    with pruned(model, schedule_for(model, (0, 1.0), (3, 1.0))):
        found = generate(model, inputs)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("scorer", ["text_guided", "last_token", "random", "strided"])
def test_the_device_keeps_the_tokens_that_the_cpu_keeps(scorer: str) -> None:
    tiny, kept = FAMILIES["llava"], []
    for device in ("cpu", DEVICE):
        model = tiny.build().to(device)
        inputs = {name: value.to(device) for name, value in tiny.batch(ROWS).items()}
        with pruned(model, schedule_for(model, *STAGES, scorer=scorer)) as record, torch.no_grad():
            model(**inputs)
        kept.append([stage.kept_positions() for stage in record.stages])
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("kernel", "available"),
    [
        # Any other kernel in their place, to run this test where there is no GPU.
        ("flash_attention_2" if ON_GPU else "eager", is_flash_attn_2_available if ON_GPU else lambda: True),
        ("flash_attention_3", is_flash_attn_3_available),
    ],
)
def test_flash_attention_prunes_as_sdpa_does(kernel: str, available: Any) -> None:
    if not available():
        pytest.skip(f"{kernel} is not installed")
    inputs = on_device(FAMILIES["llava"].batch(ROWS), torch.bfloat16)
    logits = {}
    for attention in ("sdpa", kernel):
        # In the decoder alone, with heads of 64, which the kernels of all releases take.
        chosen: Any = {"text_config": attention, "vision_config": "sdpa"}
        model = build("llava", torch.bfloat16, attention=chosen, head_dim=64)
        assert model.get_decoder().config._attn_implementation == attention
        # A rule by position, so that rounding cannot change which tokens stay.
        with pruned(model, schedule_for(model, *STAGES, scorer="strided")), torch.no_grad():
            logits[attention] = model(**inputs, logits_to_keep=1).logits.float()
        # Scoring gets its queries and keys from this kernel's call too.
        with pruned(model, schedule_for(model, *STAGES)) as record:
            tokens, _ = generate(model, inputs)
        assert [stage.keep for stage in record.stages] == [(16, 8, 0), (6, 3, 0)]
        assert tokens.shape == (len(ROWS), STEPS)
    assert (logits[kernel] - logits["sdpa"]).abs().max() <= BFLOAT16_TOLERANCE


def _set_sync_debug_mode(mode: str) -> None:
    if ON_GPU:
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def waiting_is_an_error_inside(model: PreTrainedModel, *, first: bool) -> Iterator[list[str]]:
    """Waiting for the device is an error in everything that `pruned` adds to the decoder, and in its layers.

    Enter it twice, with ``first`` before the ``with`` of `pruned` and without inside: hooks run in the order in
    which they are put in. Yields what was switched, in order. What the model does itself between its decoder's
    first line and its first layer (masks, rotary tables) may wait.
    """
    decoder, switched = model.get_decoder(), []

    def to(mode: str) -> Any:
        def hook(*_: Any) -> None:
            switched.append(mode)
            _set_sync_debug_mode(mode)

        return hook

    error, default = to("error"), to("default")
    layers: Any = decoder.layers
    with ExitStack() as undo:
        if first:
            hooks = [
                decoder.register_forward_pre_hook(error),
                layers[0].register_forward_pre_hook(error),
                decoder.register_forward_hook(error),
            ]
        else:
            hooks = [
                decoder.register_forward_pre_hook(default),
                layers[-1].register_forward_hook(default),
                decoder.register_forward_hook(default),
            ]
        for hook in hooks:
            undo.callback(hook.remove)
        undo.callback(_set_sync_debug_mode, "default")
        yield switched


@pytest.mark.parametrize("scorer", ["text_guided", "strided", "random"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "llava_next", "qwen3_vl"])
def test_nothing_waits_for_the_device_after_the_plan(name: str, scorer: str) -> None:
    tiny: Any = FAMILIES.get(name) or FAMILIES_A[name]
    model, inputs = tiny.build().to(DEVICE), on_device(tiny.batch(ROWS))
    schedule = schedule_for(model, *STAGES, scorer=scorer)
    with pruned(model, schedule), torch.no_grad():
        model(**inputs)  # libraries set themselves up at their first call
    with (
        waiting_is_an_error_inside(model, first=True) as on,
        pruned(model, schedule) as record,
        waiting_is_an_error_inside(model, first=False) as off,
        torch.no_grad(),
    ):
        model(**inputs)
    assert (on, off) == (["error"] * 3, ["default"] * 3)
    assert len(record.stages) == len(STAGES)


def test_waiting_in_a_layer_is_noticed() -> None:
    if not ON_GPU:
        pytest.skip("only a GPU can be waited for")
    tiny = FAMILIES["llava"]
    model, inputs = build("llava"), on_device(tiny.batch(ROWS))
    layer: nn.Module = model.get_decoder().layers[1]
    layer.register_forward_pre_hook(lambda _module, args: (args[0].sum().item(), None)[1])
    with (
        pytest.raises(RuntimeError, match="synchroniz"),
        waiting_is_an_error_inside(model, first=True),
        pruned(model, schedule_for(model, *STAGES)),
        waiting_is_an_error_inside(model, first=False),
        torch.no_grad(),
    ):
        model(**inputs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "llava_next", "qwen3_vl"])
def test_two_devices(name: str, attention: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    if ON_GPU and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    near, far = ("cuda:0", "cuda:1") if ON_GPU else (DEVICE, DEVICE)
    tiny: Any = FAMILIES.get(name) or FAMILIES_A[name]
    whole, spread = (tiny.build(attention=attention) for _ in range(2))
    schedule, inputs = schedule_for(whole, *STAGES), on_device(tiny.batch(ROWS))
    # The second stage's tokens leave where the devices meet.
    layers = {id(block) for block in spread.get_decoder().layers[3:]}
    behind = {name for name, module in spread.named_modules() if id(module) in layers}
    places = {name: far if name in behind else near for name in device_map(spread)}
    covered = tuple(f"{name}." for name in places)
    places |= {name: near for name, _ in spread.named_parameters() if not name.startswith(covered)}
    spread = accelerate.dispatch_model(spread, places, main_device=near, force_hooks=True)
    results = []
    for model in (whole.to(near), spread):
        with pruned(model, schedule) as record:
            tokens, logits = generate(model, inputs)
        results.append((tokens, logits, [stage.kept_positions() for stage in record.stages]))
    assert results[0][2] == results[1][2]
    assert torch.equal(results[0][0], results[1][0])
    assert (results[0][1] - results[1][1].to(near)).abs().max() <= FLOAT32_TOLERANCE


def test_timing_by_events() -> None:
    model, inputs = build("llava"), on_device(FAMILIES["llava"].batch(ROWS))
    with pruned(model, schedule_for(model, *STAGES), timing=True) as record:
        generate(model, inputs)
    spent = record.milliseconds
    assert set(spent) == {"prefill", "scoring", "dropping", "decode"}
    assert min(spent.values()) > 0
    assert spent["scoring"] + spent["dropping"] < spent["prefill"]


@pytest.mark.filterwarnings("ignore:fast=True. there are no CUDA graphs" if not ON_GPU else "error:fast=True")
@pytest.mark.parametrize("dropped_tokens", ["discard", "merge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_prefills_equal_plain_ones(family: str, dtype: torch.dtype, dropped_tokens: str) -> None:
    """Several prompts through one graph, then one of another shape, then the first again."""
    tiny, model = FAMILIES[family], build(family, dtype)
    schedule = schedule_for(model, *STAGES, scorer="strided", dropped_tokens=dropped_tokens)
    prompts = [on_device(tiny.batch((1,), text=(words,), seed=words), dtype) for words in (9, 8, 60, 9)]
    with pruned(model, schedule):
        expected = [generate(model, prompt) for prompt in prompts]
    with pruned(model, schedule, fast=True) as record:
        found = [generate(model, prompt) for prompt in prompts]
    assert (record.fast_prefills, record.captures) == (4, 2)
    for (_, logits), (_, plain) in zip(found, expected, strict=True):
        tolerance = FLOAT32_TOLERANCE if dtype is torch.float32 else BFLOAT16_TOLERANCE
        assert (logits[:, 0].float() - plain[:, 0].float()).abs().max() <= tolerance
        if dtype is torch.float32:
            assert (logits - plain).abs().max() <= tolerance


@pytest.mark.filterwarnings("ignore:fast=True. there are no CUDA graphs")
@pytest.mark.parametrize("scorer", ["text_guided", "last_token"])
def test_captured_scoring_keeps_the_same_tokens(scorer: str) -> None:
    model, inputs = build("llava"), on_device(FAMILIES["llava"].batch(ROWS))
    kept = []
    for fast in (False, True):
        schedule = schedule_for(model, *STAGES, scorer=scorer)
        with pruned(model, schedule, fast=fast) as record:
            tokens, _ = generate(model, inputs)
        kept.append(([stage.kept_positions() for stage in record.stages], tokens.tolist()))
    assert kept[0] == kept[1]
    assert record.fast_prefills == 1


def test_a_decoder_that_waits_takes_the_plain_path() -> None:
    if not ON_GPU:
        pytest.skip("only a GPU can be waited for")
    model, inputs = build("llava"), on_device(FAMILIES["llava"].batch(ROWS))
    schedule = schedule_for(model, *STAGES)
    layer: nn.Module = model.get_decoder().layers[1]
    layer.register_forward_pre_hook(lambda _module, args: (args[0].sum().item(), None)[1])
    with pruned(model, schedule):
        expected = generate(model, inputs)

    def prompts() -> list[tuple[Tensor, Tensor]]:
        greedily = [generate(model, inputs) for _ in range(2)]
        # What the capture took is given back: the stream, and random numbers.
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        model.generate(**inputs, do_sample=True, max_new_tokens=2)
        return greedily

    with (
        pytest.warns(UserWarning, match="could not be captured"),
        pruned(model, schedule, fast=True) as record,
    ):
        found = prompts()
    assert (record.prefills, record.fast_prefills) == (3, 0)
    for tokens, logits in found:
        assert torch.equal(tokens, expected[0])
        assert torch.equal(logits, expected[1])
