"""The bench's arithmetic: clocks, token counts, break-even, the roofline. No model, no time."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_runtime import Schedule, ScheduleError, Stage
from pruning_runtime.costs import prefill_flops
from pruning_runtime.geometry import DecoderShape
from pruning_runtime.schedule import BackboneIdentity, ScorerChoice
from schedule_finder.benchmark import choose_schedule, faster_text
from schedule_finder.benchmark.baselines import baselines
from schedule_finder.benchmark.clock import PartClock
from schedule_finder.benchmark.memory import peak_bytes
from schedule_finder.benchmark.one_run import Run
from schedule_finder.benchmark.report import ran_on, table
from schedule_finder.benchmark.roofline import Rates, measure_rates, roofline_ms
from schedule_finder.benchmark.summary import break_even, times

SHAPE = DecoderShape(
    num_layers=12,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=100,
)


# ---- the clock


class Steps:
    """A clock with a given duration for each step, in whole milliseconds."""

    def __init__(self, durations: list[int]) -> None:
        self._moments = iter([0, *itertools.accumulate(durations)])

    def clock(self) -> PartClock:
        return PartClock(lambda: next(self._moments), lambda begun, ended: float(ended - begun))


@given(
    actions=st.lists(st.sampled_from(["decoder", "lm_head", "leave", "token"]), max_size=40),
    durations=st.lists(st.integers(0, 1000), min_size=50, max_size=50),
)
@settings(deadline=None)
def test_parts_add_up_to_the_total_whatever_happens(actions: list[str], durations: list[int]) -> None:
    clock, depth = Steps(durations).clock(), 0
    clock.start()
    steps = 0
    for action in actions:
        if action == "leave" and not depth:
            continue
        steps += 1
        if action == "token":
            clock.end_forward(last=False)
        elif action == "leave":
            clock.leave()
            depth -= 1
        else:
            clock.enter(action)
            depth += 1
    clock.end_forward(last=True)
    parts, tokens = clock.read()
    assert sum(sum(phase.values()) for phase in parts.values()) == tokens[-1] == sum(durations[: steps + 1])
    assert sum(parts["prefill"].values()) == tokens[0]


def test_an_outer_part_stands_still_while_an_inner_one_is_open() -> None:
    clock = Steps([1, 10, 100, 1000, 10000, 7, 70, 700]).clock()
    clock.start()  # 1 ms of other
    clock.enter("vision_tower")  # 10
    clock.enter("projector")  # 100
    clock.leave()  # 1000 of the tower
    clock.leave()  # 10000 of other
    clock.end_forward(last=False)  # 7 of other, decoding
    clock.enter("decoder")  # 70
    clock.leave()  # 700 of other
    clock.end_forward(last=True)
    parts, tokens = clock.read()
    assert parts["prefill"] == {"other": 10001, "vision_tower": 1010, "projector": 100}
    assert parts["decode"] == {"other": 707, "decoder": 70}
    assert tokens == [11111, 11888]


def test_a_stopped_clock_takes_no_moments() -> None:
    clock = Steps([5]).clock()
    clock.enter("decoder")
    clock.start()
    clock.end_forward(last=True)
    clock.enter("decoder")
    clock.leave()
    clock.end_forward(last=True)
    assert clock.read() == ({"prefill": {"other": 5.0}, "decode": {}}, [5.0])


# ---- baselines


def schedule(*stages: tuple[int, float], layers: int = 12, scorer: str = "text_guided") -> Schedule:
    return Schedule(
        backbone=BackboneIdentity(name="made up", model_type="llava", num_layers=layers),
        stages=tuple(Stage(layer=layer, keep_ratio=ratio) for layer, ratio in stages),
        scorer=ScorerChoice(name=scorer),
    )


def tokens_of(stages: tuple[Stage, ...], num_vision: int, layers: int) -> list[int]:
    """Vision tokens of each layer, counted layer by layer."""
    left, counts = num_vision, []
    kept = {stage.layer: stage.kept(num_vision) for stage in stages}
    left = kept.get(-1, left)
    for layer in range(layers):
        counts.append(left)
        left = kept.get(layer, left)
    return counts


@given(
    layers=st.integers(4, 40),
    places=st.sets(st.integers(0, 30), min_size=1, max_size=3),
    kept=st.lists(st.floats(0, 1), min_size=3, max_size=3).map(lambda ratios: sorted(ratios, reverse=True)),
    num_vision=st.integers(1, 3000),
)
@settings(deadline=None, max_examples=200)
def test_baselines_cost_as_much_as_the_schedule(
    layers: int, places: set[int], kept: list[float], num_vision: int
) -> None:
    stages = [
        (layer, ratio) for layer, ratio in zip(sorted(places), kept, strict=False) if layer < layers - 1
    ]
    ours = schedule(*stages, layers=layers)
    processed = sum(tokens_of(ours.stages, num_vision, layers))
    by_name = {one.name: one for one in baselines(ours, num_vision)}
    assert by_name["unpruned"].schedule is None
    assert by_name["schedule"].schedule == ours
    for name in ("no-scoring bound", "eager, syncs"):
        same = by_name[name].schedule
        assert same is not None
        assert same.stages == ours.stages
        assert same.scorer.name == "strided"
    for name in ("FastV-like", "before decoder"):
        if name not in by_name:
            continue
        other = by_name[name].schedule
        assert other is not None
        (stage,) = other.stages
        # Whole tokens: half a token at most, in each layer behind the stage.
        later = layers - 1 - stage.layer
        assert abs(sum(tokens_of(other.stages, num_vision, layers)) - processed) <= later / 2 + 1e-6
    assert [one.eager_stages for one in by_name.values()].count(True) == 1
    assert not any(one.fast for one in by_name.values())


def test_the_fast_path_has_an_unpruned_baseline_of_its_own() -> None:
    ours = schedule((1, 0.2), (5, 0.1))
    plain = baselines(ours, 576)
    *others, full, fast = baselines(ours, 576, fast=True)
    assert others == plain
    assert full.schedule is not None
    assert full.schedule.stages == ()
    assert full.schedule.backbone == ours.backbone
    assert fast.schedule == ours
    assert (full.fast, fast.fast) == (True, True)
    assert {one.baseline for one in plain} == {"unpruned"}
    assert {full.baseline, fast.baseline} == {full.name}


def test_other_methods_drop_as_they_do_themselves() -> None:
    """Merging is ours: weighing a token by what it stands for costs time that FastV does not spend."""
    ours = schedule((1, 0.2), (5, 0.1)).model_copy(update={"dropped_tokens": "merge"})
    dropped_tokens = {
        one.name: one.schedule.dropped_tokens for one in baselines(ours, 576, fast=True) if one.schedule
    }
    assert dropped_tokens == {
        "schedule": "merge",
        "no-scoring bound": "merge",
        "eager, syncs": "merge",
        "FastV-like": "discard",
        "before decoder": "discard",
        "unpruned, fast": "discard",
        "schedule, fast": "merge",
    }


def test_fastv_stands_after_layer_1_or_0_or_nowhere() -> None:
    def layer(found: Schedule) -> int | None:
        by_name = {one.name: one.schedule for one in baselines(found, 576)}
        return by_name["FastV-like"].stages[0].layer if "FastV-like" in by_name else None

    assert layer(schedule((1, 0.2), (5, 0.1))) == 1
    assert layer(schedule((0, 0.01))) == 0
    assert layer(schedule((-1, 0.01), scorer="strided")) is None


# ---- schedules


def backbone(name: str, model_type: str, layers: int) -> Any:
    shape = SimpleNamespace(num_layers=layers)
    return SimpleNamespace(name=name, model_type=model_type, shape=shape, config_digest="sha256:0")


@pytest.mark.parametrize(
    ("model_type", "layers", "preset"),
    [
        ("llava", 32, "adaptinfer/llava-1.5-7b-64"),
        ("llava", 40, "adaptinfer/llava-1.5-13b-64"),
        ("qwen2_vl", 28, "adaptinfer/qwen2-vl-2b-10"),
    ],
)
def test_the_preset_that_fits_is_the_default(model_type: str, layers: int, preset: str) -> None:
    assert choose_schedule(None, backbone("any", model_type, layers)) == (Schedule.preset(preset), preset)


@pytest.mark.parametrize("layers", [12, 28, 36])
def test_a_preset_is_scaled_to_another_depth(layers: int) -> None:
    found, source = choose_schedule(None, backbone("any", "qwen3_vl", layers))
    preset = Schedule.preset("adaptinfer/llava-1.5-7b-64")
    assert "scaled" in source
    assert (found.backbone.model_type, found.backbone.num_layers) == ("qwen3_vl", layers)
    assert [stage.keep_ratio for stage in found.stages] == [stage.keep_ratio for stage in preset.stages]
    for mine, theirs in zip(found.stages, preset.stages, strict=True):
        assert abs(mine.layer / layers - theirs.layer / 32) <= 0.5 / layers + 1e-9


def test_a_file_for_another_backbone_is_scaled_onto_a_shape_only(tmp_path: Any) -> None:
    path = tmp_path / "schedule.json"
    schedule((0, 0.5), (6, 0.25)).save(path)
    found, source = choose_schedule(str(path), backbone("shape:x", "llava", 24))
    assert [(stage.layer, stage.keep_ratio) for stage in found.stages] == [(0, 0.5), (12, 0.25)]
    assert "scaled" in source
    with pytest.raises(ScheduleError, match="num_layers is 24"):
        choose_schedule(str(path), backbone("./my-llava", "llava", 24))
    assert choose_schedule(str(path), backbone("./my-llava", "llava", 12)) == (Schedule.load(path), str(path))


# ---- break-even


@given(gain=st.integers(-50, 50), loss=st.integers(-20, 20), tokens=st.integers(1, 200))
def test_break_even_equals_comparing_totals(gain: int, loss: int, tokens: int) -> None:
    faster = gain > (tokens - 1) * loss
    found = break_even(gain, loss)
    said = {
        "always": lambda: True,
        "never": lambda: False,
        "to": lambda: tokens <= found["tokens"],
        "from": lambda: tokens >= found["tokens"],
    }[found["when"]]()
    assert said == faster


def test_break_even_in_words() -> None:
    assert faster_text(None) == ""
    assert faster_text(break_even(10, 4)) == faster_text(break_even(12, 4)) == "to 3"
    assert faster_text(break_even(-10, -4)) == faster_text(break_even(-8, -4)) == "from 4"
    assert faster_text(break_even(1, 0)) == "always"


# ---- what rounds say


def run_of(tower: float, decoder: float, rest: float, undivided: bool = False) -> Run:
    """A prefill and one further token."""
    parts = {
        "prefill": {"vision_tower": tower, "decoder": decoder, "other": rest},
        "decode": {"decoder": decoder / 10},
    }
    first = tower + decoder + rest
    return Run(parts, [first, first + decoder / 10], 0, [1], undivided=undivided)


@given(
    usual=st.lists(st.tuples(*[st.floats(1, 10)] * 3), min_size=4, max_size=20),
    interrupted=st.tuples(*[st.floats(1, 1000)] * 3),
)
@settings(deadline=None)
def test_reported_parts_add_up_to_a_usual_total(
    usual: list[tuple[float, float, float]], interrupted: tuple[float, float, float]
) -> None:
    own = [run_of(*one) for one in (*usual, interrupted)]
    found = times(own, own, None, [1, 2])
    first = found["first_token_ms"]
    assert first["q1"] * (1 - 1e-9) <= sum(found["prefill"].values()) <= first["q3"] * (1 + 1e-9)


def test_parts_add_up_where_their_medians_do_not() -> None:
    """Interruptions that hit another part each time: the sum of medians misses the median by a third."""
    own = [run_of(40, 10, 10), run_of(10, 40, 10), run_of(10, 10, 40)]
    found = times(own, own, None, [1])
    assert sum(found["prefill"].values()) == pytest.approx(found["first_token_ms"]["median"]) == 60


def test_what_cannot_be_told_apart_has_no_time() -> None:
    own = [run_of(1, 2, 3, undivided=True)] * 3
    assert times(own, own, None, [1])["prefill"] == {
        "vision_tower": 1,
        "projector": 0,
        "decoder": 2,
        "scoring": None,
        "dropping": None,
        "lm_head": 0,
        "other": 3,
    }


def test_ratios_compare_within_a_round() -> None:
    """A machine that slows down for whole rounds changes no ratio."""
    slow = (1, 2, 5, 3)
    own, full, fast = ([run_of(1, factor * ms, 1) for factor in slow] for ms in (10, 40, 20))
    found = times(own, full, fast, [1])
    assert found["decoder_ratio"] == {"median": 0.25, "q1": 0.25, "q3": 0.25}
    assert found["same_path_ratio"] == {"median": 0.5, "q1": 0.5, "q3": 0.5}
    assert times(own, full, None, [1])["same_path_ratio"] is None


# ---- memory


def test_the_peak_is_what_lives_at_once() -> None:
    kept: list[torch.Tensor] = []

    def one_after_the_other() -> None:
        for _ in range(3):
            torch.ones(1000)

    def together() -> None:
        kept.extend(torch.ones(1000) for _ in range(3))
        kept[0].view(10, 100).t()  # no memory of its own

    assert peak_bytes(one_after_the_other, torch.device("cpu")) == 4000
    assert peak_bytes(together, torch.device("cpu")) == 12000


# ---- the roofline


def test_the_roofline_is_the_slower_of_arithmetic_and_traffic() -> None:
    tokens = [40, 10, 10]
    flops = prefill_flops(SHAPE, tokens)
    by_arithmetic = roofline_ms(SHAPE, tokens, 3, Rates(flops=1e9, bytes=1e18), 2)
    assert by_arithmetic == pytest.approx(3 * flops / 1e6)
    # Weights: q and o 64 x 64 each, k and v 64 x 32 each, three of 64 x 128. A token: 64 in, 64 out, 32 + 32 cached.
    weights, per_token = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128, 2 * 64 + 2 * 32
    by_traffic = roofline_ms(SHAPE, tokens, 3, Rates(flops=1e18, bytes=1e9), 2)
    assert by_traffic == pytest.approx(2 * sum(weights + 3 * count * per_token for count in tokens) / 1e6)
    mixed = roofline_ms(SHAPE, tokens, 3, Rates(flops=1e9, bytes=1e9), 2)
    assert max(by_arithmetic, by_traffic) <= mixed <= by_arithmetic + by_traffic


def test_the_roofline_charges_unlike_layers_one_by_one() -> None:
    shape = dataclasses.replace(SHAPE, linear_flops=(100,) * 6 + (900,) * 6, pair_flops=(2,) * 12)
    tokens = [40] * 6 + [10] * 6
    by_arithmetic = roofline_ms(shape, tokens, 1, Rates(flops=1e9, bytes=1e18), 2)
    assert by_arithmetic == pytest.approx(prefill_flops(shape, tokens) / 1e6)


def test_rates_are_measured() -> None:
    rates = measure_rates(SHAPE, 8, torch.device("cpu"), torch.float32)
    assert rates.flops > 0
    assert rates.bytes > 0


def test_a_row_is_flat() -> None:
    spread = {"median": 2.0, "q1": 1.0, "q3": 3.0}
    result = {
        "batch": 1,
        "baseline": "x",
        "tokens_per_layer": [1],
        "total_ms": {"16": spread},
        "token_ms": None,
        "faster": {"when": "to", "tokens": 7},
        "rounds": [],
    }
    assert table({"results": [result]}) == [
        {
            "batch": 1,
            "baseline": "x",
            "total_ms_16": 2.0,
            "total_ms_16_q1": 1.0,
            "total_ms_16_q3": 3.0,
            "token_ms": None,
            "faster": "to 7",
        }
    ]


def test_the_device_is_named_as_a_reader_knows_it() -> None:
    def named(**environment: Any) -> str:
        return ran_on({"environment": {"device": "cpu", "device_name": None, "threads": 1, **environment}})

    assert named() == "cpu, 1 thread"
    assert named(threads=2) == "cpu, 2 threads"
    assert named(device="cuda:0", device_name="NVIDIA H100") == "NVIDIA H100"
