"""What a run's record says, from stages given by hand."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from pruning_runtime import Record, Stage
from pruning_runtime.costs import processed_ratios
from pruning_runtime.record import StageRecord
from pruning_runtime.timing import Stopwatch


def stage_record(layer: int, keep: tuple[int, ...]) -> StageRecord:
    nothing = torch.zeros(len(keep), 0, dtype=torch.long)
    return StageRecord(layer, keep, nothing, nothing.bool())


def two_stages() -> Record:
    return Record(
        num_layers=5,
        prefills=1,
        num_vision=(16, 8, 0),
        num_other=(4, 5, 6),
        stages=[stage_record(0, (8, 4, 0)), stage_record(3, (2, 1, 0))],
    )


def test_a_stage_counts_from_the_layer_after_its_own() -> None:
    record = two_stages()
    vision = [[16, 8, 0], [8, 4, 0], [8, 4, 0], [8, 4, 0], [2, 1, 0]]
    assert record.vision_tokens_per_layer == vision
    assert record.tokens_per_layer == [[a + 4, b + 5, c + 6] for a, b, c in vision]
    assert record.processed == pytest.approx((24 + 3 * 12 + 3) / (5 * 24))


def test_before_the_decoder_no_layer_sees_the_dropped_tokens() -> None:
    record = Record(
        num_layers=2, prefills=1, num_vision=(10,), num_other=(1,), stages=[stage_record(-1, (3,))]
    )
    assert record.vision_tokens_per_layer == [[3], [3]]


@pytest.mark.parametrize("num_vision", [(), (0, 0)])
def test_without_vision_tokens_everything_was_processed(num_vision: tuple[int, ...]) -> None:
    record = Record(num_layers=3, num_vision=num_vision, num_other=(2,) * len(num_vision))
    assert record.processed == 1.0


@given(
    layers=st.sets(st.integers(-1, 6), max_size=4).map(sorted),
    kept=st.lists(st.integers(0, 64), min_size=4, max_size=4).map(
        lambda counts: sorted(counts, reverse=True)
    ),
)
@settings(deadline=None, max_examples=50)
def test_the_record_and_the_accounting_agree(layers: list[int], kept: list[int]) -> None:
    """Ratios of 64 tokens are exact, so that both count the same tokens."""
    pairs = list(zip(layers, kept, strict=False))
    stages = [Stage(layer=layer, keep_ratio=count / 64) for layer, count in pairs]
    record = Record(
        num_layers=8,
        prefills=1,
        num_vision=(64,),
        num_other=(3,),
        stages=[stage_record(layer, (count,)) for layer, count in pairs],
    )
    expected = processed_ratios(stages, 8)
    assert [row[0] / 64 for row in record.vision_tokens_per_layer] == expected
    assert record.processed == pytest.approx(sum(expected) / 8)


@pytest.mark.parametrize(("first", "pre_decoder_cost"), [(-1, 0.3), (0, 0.0)])
def test_a_look_is_charged_where_tokens_left_before_the_decoder(first: int, pre_decoder_cost: float) -> None:
    """A stage that drops none of a small prompt's tokens is not listed, and nothing was looked at for it."""
    record = Record(
        num_layers=4,
        pre_decoder_share=0.3,
        prefills=1,
        num_vision=(8,),
        num_other=(3,),
        stages=[stage_record(first, (4,))],
    )
    assert record.pre_decoder_cost == pre_decoder_cost
    assert record.processed == pytest.approx(((8 if first == 0 else 4) + 3 * 4) / 32 + pre_decoder_cost / 4)


def test_kept_positions_are_those_of_kept_vision_tokens_only() -> None:
    index = torch.tensor([[0, 2, 5, 6], [1, 3, 4, 6]])
    kept_vision = torch.tensor([[False, True, True, False], [False] * 4])
    stage = StageRecord(1, (2, 0), index, kept_vision)
    assert stage.kept_positions() == [[2, 5], []]


def test_cache_bytes_are_those_of_the_tensors() -> None:
    record = Record(num_layers=2)
    assert record.cache_bytes == 0
    record.cache = DynamicCache()
    assert record.cache_bytes == 0
    for layer, tokens in enumerate((7, 3)):
        states = torch.zeros(1, 2, tokens, 4, dtype=torch.float16)
        record.cache.update(states, states.clone(), layer)
    assert record.cache_bytes == 2 * (7 + 3) * 2 * 4 * 2


def test_printing_says_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(Record(num_layers=4)) == "no prefill yet"
    clock, record = FakeClock(monkeypatch), two_stages()
    record.watch = Stopwatch(torch.device("cpu"), enabled=True)
    with record.watch.part("prefill"):
        clock.now += 0.0125
    assert str(record).splitlines() == [
        "3 row(s), 24 vision tokens; 52.5 % of them computed per layer on average; cache 0.00 MiB",
        "  after layer 0: kept 8, 4, 0",
        "  after layer 3: kept 2, 1, 0",
        "  prefill: 12.50 ms",
    ]


def test_two_records_share_no_lists() -> None:
    one, other = Record(num_layers=1), Record(num_layers=1)
    one.stages.append(stage_record(0, (1,)))
    assert (other.stages, other.milliseconds) == ([], {})


# ---- the stopwatch


class FakeClock:
    """Seconds that pass only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_a_stopwatch_sums_milliseconds_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, watch = FakeClock(monkeypatch), Stopwatch(torch.device("cpu"), enabled=True)
    for seconds in (0.25, 0.5):
        watch.start("prefill")
        with watch.part("scoring"):
            clock.now += seconds
        clock.now += 1.0
        watch.stop("prefill")
    assert watch.sums() == pytest.approx({"prefill": 2750.0, "scoring": 750.0})


def test_a_stopwatch_that_is_off_sums_nothing() -> None:
    watch = Stopwatch(torch.device("cpu"), enabled=False)
    with watch.part("prefill"):
        pass
    watch.stop("never started")
    assert watch.sums() == {}


def test_sums_are_a_copy() -> None:
    watch = Stopwatch(torch.device("cpu"), enabled=True)
    with watch.part("prefill"):
        pass
    watch.sums().clear()
    assert set(watch.sums()) == {"prefill"}
