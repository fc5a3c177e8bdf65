"""The bench on a GPU: events for a clock, and the fast path captured."""

from __future__ import annotations

import pytest
import torch

from pruning_runtime import find_backbone
from schedule_finder.benchmark import DECODE_PARTS, PREFILL_PARTS, run_benchmark
from tests.support.on_gpu import DEVICE, GPU_MARKS, build
from tests.support.schedules import schedule_for

pytestmark = GPU_MARKS


def test_every_competitor_runs_and_its_parts_add_up() -> None:
    model = build("llava", torch.bfloat16)
    schedule = schedule_for(model, (0, 0.5), (3, 0.25), positions="renumbered")
    document = run_benchmark(
        find_backbone(model), schedule, batches=(1, 2), lengths=(1, 3), rounds=4, seconds=1e6, fast=True
    )
    assert document["failed"] == []
    assert len(document["results"]) == 2 * 8
    for result in document["results"]:
        for row in result["rounds"]:
            parts = row["parts"]
            assert set(parts["prefill"]) <= set(PREFILL_PARTS)
            assert set(parts["decode"]) <= set(DECODE_PARTS)
            assert min(value for phase in parts.values() for value in phase.values()) >= 0
            assert sum(map(sum, (phase.values() for phase in parts.values()))) == pytest.approx(
                row["total_ms"]
            )
        assert result["peak_bytes"] > 0
        assert result["same_path_ratio"]["median"] > 0
    by_name = {result["baseline"]: result for result in document["results"] if result["batch"] == 2}
    for ours, same in (
        ("schedule", "no-scoring bound"),
        ("schedule", "schedule, fast"),
        ("unpruned", "unpruned, fast"),
    ):
        assert by_name[ours]["tokens_per_layer"] == by_name[same]["tokens_per_layer"]
        assert by_name[ours]["cache_bytes"] == by_name[same]["cache_bytes"]
    assert document["environment"]["device"].startswith(DEVICE)
    assert (document["environment"]["device_name"] is not None) == (DEVICE == "cuda")
