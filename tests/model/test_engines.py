"""Batches of a chunk: what they hold, that they never change, and what happens when memory runs out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pruning_runtime import find_backbone
from schedule_finder.errors import InputError
from schedule_finder.models.loading import LoadedBackbone, load_backbone
from schedule_finder.profiling.capture import ProfileRow, profile_batch
from schedule_finder.profiling.engines.base import MOST_TOKENS_ON_CPU, BatchLimits, Outcome, SampleChunk
from schedule_finder.profiling.engines.worker import Worker, is_out_of_memory
from schedule_finder.samples import BadSample, Sample, SampleEntry
from tests.support.dispatching import dispatched
from tests.support.tiny_folder import WORDS, write_llava_folder, write_qwen2_vl_folder
from tests.support.tiny_models import FAMILIES


class Pictures:
    """Samples with images of many sizes; some that are no use."""

    source = "pictures"

    def __init__(self, count: int, *, unreadable: int = -1, thin: int = -1, word: tuple[int, str] = (-1, "")):
        rng = np.random.default_rng(0)
        self._samples = []
        for row in range(count):
            height, width = (8, 2000) if row == thin else rng.choice((16, 24, 40, 64), 2)
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            words = [*rng.choice(WORDS[5:], row % 6), *([word[1]] if row == word[0] else [])]
            self._samples.append(Sample(str(row), (image,), " ".join(["what", *words]), None))
        self._unreadable = unreadable

    def size(self, use: str) -> int:
        return len(self._samples)

    def load(self, entry: SampleEntry) -> Sample:
        if entry.row == self._unreadable:
            raise BadSample("it is planted")
        return self._samples[entry.row]

    def chunk(self, wanted: set[str] | None = None) -> SampleChunk:
        entries = tuple(SampleEntry(s.id, self.source, i, "calibration") for i, s in enumerate(self._samples))
        return SampleChunk(0, entries, frozenset(wanted or {entry.id for entry in entries}))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> LoadedBackbone:
    return load_backbone(str(write_qwen2_vl_folder(tmp_path_factory.mktemp("qwen"))), device="cpu")


@pytest.fixture
def shapes(qwen: LoadedBackbone) -> Iterator[list[tuple[int, int]]]:
    """Shapes of the batches that the model saw."""
    seen: list[tuple[int, int]] = []
    model = qwen.backbone.model
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield seen
    hook.remove()


def outcomes(
    loaded: LoadedBackbone,
    data: Pictures,
    limits: BatchLimits,
    wanted: set[str] | None = None,
    **options: Any,
) -> dict[str, Outcome]:
    report = options.get("report", lambda line: pytest.fail(line))
    found = [o for some in Worker(loaded, data, limits, report).profile(data.chunk(wanted)) for o in some]
    assert len({outcome.entry.id for outcome in found}) == len(found)
    return {outcome.entry.id: outcome for outcome in found}


def assert_same(found: ProfileRow | None, expected: ProfileRow | None) -> None:
    assert found is not None
    assert expected is not None
    for name in expected.scores:
        np.testing.assert_array_equal(found.scores[name], expected.scores[name])
    for name in expected.curves:
        np.testing.assert_array_equal(found.curves[name], expected.curves[name])


@pytest.mark.parametrize("limits", [BatchLimits(8, 10_000), BatchLimits(32, 250), BatchLimits(5, 90)])
def test_rows_do_not_depend_on_which_are_wanted(qwen: LoadedBackbone, limits: BatchLimits) -> None:
    data = Pictures(30, unreadable=4, thin=11)
    whole = outcomes(qwen, data, limits)
    assert {name for name, outcome in whole.items() if outcome.row is None} == {"4", "11"}
    assert "planted" in str(whole["4"].entry.reason)
    assert whole["11"].entry.status == "skipped"
    for seed in range(3):
        wanted = set(random.Random(seed).sample([*whole], 6))
        some = outcomes(qwen, data, limits, wanted)
        assert set(some) == wanted
        for name in wanted:
            assert some[name].entry == whole[name].entry
            if whole[name].row is not None:
                assert_same(some[name].row, whole[name].row)


def test_batches_are_small_on_a_cpu_unless_a_number_is_given(
    qwen: LoadedBackbone, shapes: list[tuple[int, int]]
) -> None:
    outcomes(qwen, Pictures(60), BatchLimits(64))
    assert all(rows * length <= MOST_TOKENS_ON_CPU for rows, length in shapes)
    assert BatchLimits().tokens_on(torch.device("cuda", 0)) > MOST_TOKENS_ON_CPU
    assert BatchLimits(tokens=7).tokens_on(torch.device("cpu")) == 7
    shapes.clear()
    outcomes(qwen, Pictures(60), BatchLimits(64, 10**6))
    assert any(rows * length > MOST_TOKENS_ON_CPU for rows, length in shapes)


def test_batches_keep_to_both_limits(
    qwen: LoadedBackbone, shapes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[int] = []
    inputs = LoadedBackbone.inputs
    monkeypatch.setattr(
        LoadedBackbone,
        "inputs",
        lambda self, samples: [prepared.append(len(samples)), inputs(self, samples)][1],
    )
    found = outcomes(qwen, Pictures(40), BatchLimits(6, 150))
    assert all(outcome.entry.status == "done" for outcome in found.values())
    assert all(rows <= 6 and (rows * length <= 150 or rows == 1) for rows, length in shapes)
    # Large samples go by few, small ones by many; and few batches are prepared that turn out too large.
    assert {6} < {rows for rows, _ in shapes}
    assert len(shapes) < 16
    assert len(prepared) <= len(shapes) + 3


def test_a_batch_of_different_questions_is_as_each_alone(qwen: LoadedBackbone) -> None:
    data = Pictures(12)
    together, alone = outcomes(qwen, data, BatchLimits(12)), outcomes(qwen, data, BatchLimits(1))
    for name, outcome in together.items():
        for field, values in outcome.row.scores.items():  # type: ignore[union-attr]
            np.testing.assert_allclose(values, alone[name].row.scores[field], atol=1e-5, rtol=1e-4)  # type: ignore[union-attr]


class Memory:
    """A forward that has memory for so many tokens, and raises PyTorch's own error beyond."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.failures = 0

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].numel() > self.tokens:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB.")


def test_out_of_memory_halves_the_batch_for_good(qwen: LoadedBackbone, shapes: list[tuple[int, int]]) -> None:
    data, lines, memory = Pictures(60), [], Memory(200)
    hook = qwen.backbone.model.register_forward_pre_hook(memory, with_kwargs=True)
    try:
        found = outcomes(qwen, data, BatchLimits(32, 1500), report=lines.append)
    finally:
        hook.remove()
    assert all(outcome.row is not None for outcome in found.values())
    assert 1 <= memory.failures <= 4
    assert len(lines) == memory.failures
    assert "out of memory with" in lines[0]
    done = [rows * length for rows, length in shapes if rows * length <= 200]
    assert max(done[-3:]) > 50


def test_a_sample_too_large_for_the_memory_is_skipped(qwen: LoadedBackbone) -> None:
    data, memory = Pictures(20), Memory(22)
    hook = qwen.backbone.model.register_forward_pre_hook(memory, with_kwargs=True)
    try:
        found = outcomes(qwen, data, BatchLimits(4), report=lambda line: None)
    finally:
        hook.remove()
    reasons = {outcome.entry.reason for outcome in found.values() if outcome.row is None}
    assert 0 < sum(outcome.row is None for outcome in found.values()) < 20
    assert all("out of memory with this sample alone" in str(reason) for reason in reasons)


def test_the_host_s_own_errors_are_known() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    with pytest.raises(MemoryError) as refused_too:
        np.empty(2**60, dtype=np.uint8)
    assert is_out_of_memory(refused_too.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_attention_that_is_not_finite_is_skipped(tmp_path: Path) -> None:
    """One word's embedding is NaN: whoever asks with it is skipped, its neighbours in the batch are not."""
    loaded = load_backbone(str(write_llava_folder(tmp_path)), device="cpu")
    token = loaded.processor.tokenizer.convert_tokens_to_ids("word50")  # type: ignore[attr-defined]
    with torch.no_grad():
        loaded.backbone.model.get_input_embeddings().weight[token] = float("nan")
    found = outcomes(loaded, Pictures(9, word=(4, "word50")), BatchLimits(9))
    assert {name for name, outcome in found.items() if outcome.row is None} == {"4"}
    assert found["4"].entry.reason == "the model's attention is not finite (NaN or infinite)"


def test_what_is_wrong_with_all_samples_is_no_skipping(tmp_path: Path) -> None:
    loaded = load_backbone(str(write_llava_folder(tmp_path, template=False)), device="cpu")
    with pytest.raises(InputError, match="no chat template"):
        outcomes(loaded, Pictures(4), BatchLimits())


def test_a_model_that_is_spread_over_devices(tmp_path: Path) -> None:
    """`device_map="auto"` here is all on the cpu; and, by hand, over cpu and disk."""
    folder = str(write_llava_folder(tmp_path / "a"))
    spread, plain = load_backbone(folder, device="auto-map"), load_backbone(folder, device="cpu")
    data = Pictures(5)
    mapped = outcomes(spread, data, BatchLimits())
    for name, outcome in outcomes(plain, data, BatchLimits()).items():
        assert_same(mapped[name].row, outcome.row)

    tiny = FAMILIES["llava"]
    inputs = tiny.batch((1, 2))
    expected = profile_batch(find_backbone(tiny.build()), inputs)
    found = profile_batch(find_backbone(dispatched(tiny.build(), tmp_path / "disk")), inputs)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
