"""Engines of vLLM with the plug-in: as stock without a setting, and as the runtime in transformers with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from pruning_runtime.vllm.setting import Setting
from tests.support.vllm_references import reference_answers
from tests.support.vllm_requests import REQUESTS

pytestmark = pytest.mark.slow

FAMILIES = ("llava", "llava_next", "qwen", "qwen3")
Turns = list[list[dict[str, Any]]]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_runtime(
    family: str, folders: dict[str, Path], answers: Callable[..., Turns]
) -> None:
    """All settings mixed in one engine, with chunked prefill, several images, and client names of images."""
    expected = reference_answers(folders[family], family)
    assert len({tuple(one["tokens"]) for one in expected}) > 5  # they depend on the prompt
    for turn in answers(family):
        assert [one["prompt_tokens"] for one in turn] == [one["prompt_tokens"] for one in expected]
        assert [one["tokens"] for one in turn] == [one["tokens"] for one in expected]
        for mine, other in zip(turn, expected, strict=True):
            assert mine["logprob"] == pytest.approx(other["logprob"], abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_depend_on_the_setting(family: str, answers: Callable[..., Turns]) -> None:
    """Otherwise the equality above would not show that the right tokens are kept."""
    first: dict[str, list[float]] = {}
    for request, answer in zip(REQUESTS[family](), answers(family)[0], strict=True):
        if len(request.images) == 1:
            first.setdefault(str(request.setting), []).append(answer["logprob"])
    values = list(first.values())
    assert len(values) == 5
    for number, some in enumerate(values):
        for others in values[number + 1 :]:
            equal = sum(abs(a - b) < 1e-5 for a, b in zip(some, others, strict=True))
            assert equal < len(some) * 0.6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_turn_reads_the_prefix_cache(family: str, answers: Callable[..., Turns]) -> None:
    cached = [sum(one["cached"] for one in turn) for turn in answers(family)]
    assert cached[1] > cached[0]


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_without_a_setting_answers_are_those_of_stock_vllm(
    family: str, answers: Callable[..., Turns]
) -> None:
    stock, mine = answers(family, plugin=False, setting=False), answers(family, setting=False)
    assert mine == stock
    # And keep ratio 1 of a server that prunes changes nothing either.
    whole = [
        number
        for number, request in enumerate(REQUESTS[family]())
        if Setting().changed_by(request.setting or {}).keep_ratio == 1
    ]
    pruning = answers(family)[0]
    assert len(whole) > 5
    assert [pruning[number]["tokens"] for number in whole] == [stock[0][number]["tokens"] for number in whole]
