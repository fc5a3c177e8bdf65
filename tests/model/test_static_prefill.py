"""`pruned(..., fast=True)` gives what the plain path gives: logits, kept tokens, caches, and what comes after.

Without a GPU the static shapes run uncaptured; capturing itself is tested in `tests/gpu`.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel

from pruning_runtime import find_backbone, pruned
from pruning_runtime.preflight import why_not_static
from pruning_runtime.scorers import make_scorer
from pruning_runtime.static_prefill import runner
from pruning_runtime.static_prefill.graph import WARM_UPS, Graph
from tests.support import exactness_a, exactness_b
from tests.support.fast_path import assert_same, check, fast, generate, states
from tests.support.host_reads import host_reads
from tests.support.rounding import rounding_bound
from tests.support.schedules import schedule_for
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import FAMILIES, Inputs

ROWS = (2, 1, 0)
STAGES = ((0, 0.5), (2, 0.2))
PLAIN_ONLY = {
    "qwen3_5": "recurrent",
    "qwen3_5_moe": "recurrent",
    "minicpmv4_6": "recurrent",
    "lfm2_vl": "recurrent",
    "gemma3n": "share keys",
    "gemma4": "share keys",
    "llama4": "scaled by their position",
    "phi4_multimodal": "not given `inputs_embeds`",
    "phi4_sliding": "not given `inputs_embeds`",
}
"""Families that take the plain path, and why."""
READ_BY_THEIR_EXPERTS = frozenset({"ernie4_5_vl_moe"})
"""Families that a GPU cannot capture, because their experts pick their tokens on the host."""


def tensors_of(output: Any) -> list[Tensor]:
    """All that a static run leaves."""
    found = [output.hidden, *(state for layer in output.cached for state in (layer.keys, layer.values))]
    for segment in output.segments[1:]:
        found += [segment.index, segment.valid]
    found += [segment.sizes for segment in output.segments if segment.sizes is not None]
    return found + [stage.scores for stage in output.stages if stage.scores is not None]


@pytest.fixture(autouse=True)
def results_in_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a captured graph does: every run of one shape writes over what the last one left."""
    run = Graph.replay

    def replay(graph: Any) -> Any:
        fresh = run(graph)
        if graph._output is None:
            graph._output = fresh
        for there, value in zip(tensors_of(graph._output), tensors_of(fresh), strict=True):
            there.copy_(value)
        return graph._output

    monkeypatch.setattr(Graph, "replay", replay)


FAMILY_CASES = [*FAMILIES, *FAMILIES_A, *FAMILIES_B]


def family_and_options(name: str) -> tuple[PreTrainedModel, dict[tuple[int, ...], Inputs], dict[str, Any]]:
    """A family's model, batches, and what `pruned` needs for it (for each batch in turn, see `options_for`)."""
    if name in FAMILIES:
        tiny = FAMILIES[name]
        return tiny.build(), {rows: tiny.batch(rows) for rows in (ROWS, (1,))}, {}
    if name in FAMILIES_A:
        a = exactness_a.family_named(name)
        return a.build(), {rows: a.batch(rows) for rows in (ROWS, (1,))}, {}
    b = exactness_b.family_named(name)
    return b.build(), {rows: b.batch(rows) for rows in (ROWS, (1,))}, {"given": b}


@pytest.mark.parametrize("rows", [ROWS, (1,)], ids=["padded rows", "one row"])
@pytest.mark.parametrize("name", FAMILY_CASES)
def test_every_family(name: str, rows: tuple[int, ...]) -> None:
    model, batches, extra = family_and_options(name)
    inputs = batches[rows]
    options = {"vision_mask": exactness_b.given_mask(extra["given"], inputs)} if extra else {}
    usable = find_backbone(model).has_own_attention(0)
    schedule = schedule_for(model, *(STAGES if usable else ((1, 0.5), (3, 0.2))))
    if name not in PLAIN_ONLY:
        record = check(model, inputs, schedule, **options)
        assert len(record.stages) == 2
        return
    with pruned(model, schedule, **options):
        tokens, logits = generate(model, inputs)
    with (
        pytest.warns(UserWarning, match=PLAIN_ONLY[name]),
        pruned(model, schedule, fast=True, **options) as record,
    ):
        fallen_tokens, fallen_logits = generate(model, inputs)
    assert (record.fast_prefills, record.captures) == (0, 0)
    assert torch.equal(fallen_tokens, tokens)
    assert torch.equal(fallen_logits, logits)


@pytest.mark.parametrize(
    ("stages", "fields"),
    [
        (STAGES, {"dropped_tokens": "merge"}),
        (STAGES, {"positions": "renumbered"}),
        (STAGES, {"scorer": "last_token"}),
        (((-1, 0.5), (2, 0.3)), {"scorer": "strided"}),
        (((-1, 0.5), (2, 0.3)), {"scorer": "strided", "dropped_tokens": "merge"}),
        (((1, 0.0),), {}),
        ((), {}),
    ],
    ids=[
        "merged",
        "renumbered",
        "last token",
        "before the decoder",
        "merged, strided",
        "none kept",
        "no stage",
    ],
)
@pytest.mark.parametrize("rows", [ROWS, (1, 1), (0,)], ids=["padded", "two rows", "no image"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_kind_of_schedule(
    name: str, rows: tuple[int, ...], stages: Any, fields: dict[str, Any]
) -> None:
    tiny = FAMILIES[name]
    model = tiny.build()
    check(model, tiny.batch(rows), schedule_for(model, *stages, **fields), steps=6)


@pytest.mark.parametrize("dropped_tokens", ["discard", "merge"])
def test_separators_stay_protected(dropped_tokens: str) -> None:
    family = FAMILIES_A["llava_next"]
    model = family.build()
    check(
        model,
        family.batch(ROWS),
        schedule_for(model, *STAGES, image_newlines="protected", dropped_tokens=dropped_tokens),
    )


def test_features_that_are_added_later() -> None:
    family = FAMILIES_A["qwen3_vl"]
    model = family.build()
    check(model, family.batch(ROWS), schedule_for(model, *STAGES, dropped_tokens="merge"))


def test_eager_attention() -> None:
    tiny = FAMILIES["qwen2_vl"]
    model = tiny.build(attention="eager")
    check(model, tiny.batch(ROWS), schedule_for(model, *STAGES))


def test_scores_are_those_of_the_plain_path() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch(ROWS)
    schedule = schedule_for(model, *STAGES)
    with pruned(model, schedule, keep_scores=True) as expected:
        generate(model, inputs)
    with fast(model, schedule, keep_scores=True) as record:
        generate(model, inputs)
    vision = find_backbone(model).vision_mask(inputs["input_ids"])
    first = [stages.stages[0].scores for stages in (record, expected)]
    assert torch.allclose(first[0][vision], first[1][vision], atol=1e-6)
    second = [stages.stages[1].scores for stages in (record, expected)]
    assert second[0].shape == second[1].shape
    # The row with most images is full: all its places stand for the same tokens on both paths.
    assert torch.allclose(second[0][0], second[1][0], atol=1e-6)


def test_all_logits_stand_at_their_places() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch(ROWS)
    schedule = schedule_for(model, *STAGES)
    with torch.inference_mode():
        with pruned(model, schedule) as expected:
            logits = model(**inputs).logits
        with fast(model, schedule) as record:
            found = model(**inputs).logits
    assert record.fast_prefills == 1
    assert found.shape == logits.shape
    text = inputs["attention_mask"].bool() & ~find_backbone(model).vision_mask(inputs["input_ids"])
    assert (found - logits).abs().amax(2)[text].max() < rounding_bound(model, inputs)
    assert_same(record, expected, rounding_bound(model, inputs))


@pytest.mark.parametrize("fields", [{}, {"dropped_tokens": "merge"}, {"positions": "renumbered"}])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_capture_serves_all_prompts_of_a_bucket(name: str, fields: dict[str, Any]) -> None:
    """Shorter and longer prompts, with other pictures: nothing of the last one is left over."""
    tiny = FAMILIES[name]
    model = tiny.build()
    schedule = schedule_for(model, *STAGES, **fields)
    # The first words that need the next bucket come after these, at the prompt or at a stage.
    batches = [tiny.batch((1,), text=(words,), seed=seed) for seed, words in enumerate((9, 8, 8, 9))]
    with fast(model, schedule) as record:
        found = [generate(model, batch) for batch in batches]
    assert (record.prefills, record.fast_prefills, record.captures) == (4, 4, 1)
    for batch, (tokens, logits) in zip(batches, found, strict=True):
        with pruned(model, schedule):
            expected_tokens, expected = generate(model, batch)
        assert (logits - expected).abs().max() < rounding_bound(model, batch)
        assert torch.equal(tokens, expected_tokens)


def test_rows_of_one_capture_may_keep_different_counts() -> None:
    """The widest row sets the shapes; what the others keep is read from a buffer."""
    tiny = FAMILIES["llava"]
    model = tiny.build()
    schedule = schedule_for(model, *STAGES)
    batches = [tiny.batch(rows, text=(9, 9), seed=3) for rows in ((2, 1), (1, 2), (2, 2), (2, 0))]
    with fast(model, schedule) as record:
        found = [generate(model, batch) for batch in batches]
    assert (record.fast_prefills, record.captures) == (4, 1)
    for batch, (tokens, logits) in zip(batches, found, strict=True):
        with pruned(model, schedule):
            expected_tokens, expected = generate(model, batch)
        assert (logits - expected).abs().max() < rounding_bound(model, batch)
        assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("stages", [STAGES, ()])
def test_an_earlier_prompt_survives_the_next(stages: Any) -> None:
    """What a prefill hands out is not written over by the next one of its shape."""
    tiny = FAMILIES["llava"]
    model = tiny.build()
    schedule = schedule_for(model, *stages, dropped_tokens="merge")
    first, second = tiny.batch((1,), seed=1), tiny.batch((1,), seed=2)
    handed: list[Tensor] = []
    with torch.inference_mode(), fast(model, schedule, keep_scores=True) as record:
        watch = model.get_decoder().register_forward_hook(
            lambda _module, _args, output: handed.append(output.last_hidden_state)
        )
        output = model(**first)
        watch.remove()
        prompt = output.past_key_values.pruned_prompt
        handed += [output.logits, *states(output.past_key_values)]
        for segment in prompt.segments:
            handed += [segment.index, segment.valid]
        handed += [segment.sizes for segment in prompt.segments if segment.sizes is not None]
        handed += [stage.scores for stage in record.stages if stage.scores is not None]
        before = [tensor.clone() for tensor in handed]
        model(**second)
    assert record.captures == 1
    assert all(map(torch.equal, handed, before))


def test_graphs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was not used for longest goes, and is captured again when it is asked for."""
    tiny = FAMILIES["llava"]
    model = tiny.build()
    one, two, three = (tiny.batch((1,), text=(words,)) for words in (4, 30, 70))
    captures = []
    monkeypatch.setattr(runner, "MOST_GRAPHS", 2)
    with fast(model, schedule_for(model, *STAGES)) as record:
        for batch in (one, two, one, three, one, two):
            generate(model, batch, steps=1)
            captures.append(record.captures)
    assert captures == [1, 2, 2, 3, 3, 4]


def test_graphs_are_bounded_by_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = FAMILIES["llava"]
    model = tiny.build()
    one, two = (tiny.batch((1,), text=(words,)) for words in (4, 70))
    for most, expected in ((1 << 30, [1, 2, 2, 2]), (1, [1, 2, 3, 4])):
        monkeypatch.setattr(runner, "MOST_BYTES", most)
        captures = []
        with fast(model, schedule_for(model, *STAGES)) as record:
            for batch in (one, two, one, two):
                generate(model, batch, steps=1)
                captures.append(record.captures)
        assert captures == expected


def test_graphs_go_when_the_with_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not when Python next looks for circles of references."""
    tiny = FAMILIES["llava"]
    model = tiny.build()
    made: list[weakref.ref[Any]] = []
    begin = Graph.__init__

    def watched(graph: Any, *args: Any) -> None:
        begin(graph, *args)
        made.append(weakref.ref(graph))

    monkeypatch.setattr(Graph, "__init__", watched)
    gc.disable()
    try:
        with fast(model, schedule_for(model, *STAGES)):
            generate(model, tiny.batch((1,)), steps=1)
            assert [graph() is not None for graph in made] == [True]
        assert [graph() for graph in made] == [None]
    finally:
        gc.enable()


def test_later_turns_and_beams() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch(ROWS)
    schedule = schedule_for(model, *STAGES)
    turn = torch.randint(3, 100, (len(ROWS), 5), generator=torch.Generator().manual_seed(5))

    def talk() -> tuple[Tensor, Tensor, Tensor]:
        cache = DynamicCache(config=model.config.get_text_config())
        first, _ = generate(model, inputs, past_key_values=cache)
        ids = torch.cat([inputs["input_ids"], first, turn], 1)
        mask = torch.cat(
            [inputs["attention_mask"], torch.ones(len(ROWS), ids.shape[1] - inputs["input_ids"].shape[1])], 1
        )
        again = {"input_ids": ids, "attention_mask": mask.long()}
        return first, *generate(model, again, past_key_values=cache)

    with pruned(model, schedule):
        expected, beams = talk(), generate(model, inputs, num_beams=3)[0]
    with fast(model, schedule) as record:
        found, fast_beams = talk(), generate(model, inputs, num_beams=3)[0]
    assert record.fast_prefills == record.prefills == 2
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert (found[2] - expected[2]).abs().max() < rounding_bound(model, inputs)
    assert torch.equal(fast_beams, beams)


class _OwnCache(DynamicCache):
    """A cache of somebody's own."""


@pytest.mark.parametrize(
    ("reason", "options", "gradients"),
    [
        ("gradients are enabled", dict, True),
        ("output_hidden_states", lambda: {"output_hidden_states": True}, False),
        ("_OwnCache", lambda: {"past_key_values": _OwnCache()}, False),
    ],
)
def test_calls_that_take_the_plain_path_say_so_once(
    reason: str, options: Callable[[], dict[str, Any]], gradients: bool
) -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1,))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with (
            pruned(model, schedule_for(model, *STAGES), fast=True) as record,
            torch.set_grad_enabled(gradients),
        ):
            for _ in range(2):
                model(**inputs, **options())
    assert (record.prefills, record.fast_prefills, len(record.stages)) == (2, 0, 2)
    told = [str(warning.message) for warning in seen if "plain path" in str(warning.message)]
    assert len(told) == 1
    assert reason in told[0]


@pytest.mark.parametrize(
    ("reason", "scorer", "field"),
    [
        ("draws on the host", "random", {}),
        ("requests more", "text_guided", {"output_hidden_states": True}),
        ("longest position", "text_guided", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
        ("longest position", "strided", {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}),
    ],
)
def test_setups_that_take_the_plain_path(reason: str, scorer: str, field: dict[str, Any]) -> None:
    tiny = FAMILIES["llava"]
    model = tiny.build()
    for name, value in field.items():
        setattr(model.config.get_text_config(), name, value)
    schedule = schedule_for(model, *STAGES, scorer=scorer)
    with pytest.warns(UserWarning, match=reason), pruned(model, schedule, fast=True) as record:
        model(**tiny.batch((1,)))
    assert (record.prefills, record.fast_prefills) == (1, 0)


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn3"])
def test_other_kernels_are_not_captured(kernel: str) -> None:
    backbone = find_backbone(FAMILIES["llava"].build())
    assert why_not_static(backbone, [make_scorer("strided")]) is None
    backbone.text_model.config._attn_implementation_internal = kernel
    assert f"attention kernel {kernel!r}" in str(why_not_static(backbone, [make_scorer("strided")]))


def test_autocast_takes_the_plain_path() -> None:
    tiny = FAMILIES["llava"]
    model = tiny.build()
    with (
        pytest.warns(UserWarning, match="autocast is on"),
        pruned(model, schedule_for(model, *STAGES), fast=True) as record,
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        model(**tiny.batch((1,)))
    assert (record.prefills, record.fast_prefills) == (1, 0)


@pytest.mark.parametrize(("configured", "asked"), [(False, None), (False, True), (True, None), (True, False)])
def test_a_cache_comes_out_where_the_plain_path_has_one(configured: bool, asked: bool | None) -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1,))
    model.config.get_text_config().use_cache = configured
    asking = {} if asked is None else {"use_cache": asked}
    schedule = schedule_for(model, *STAGES)
    with torch.inference_mode():
        with pruned(model, schedule):
            expected = model(**inputs, **asking).past_key_values
        with fast(model, schedule):
            assert type(model(**inputs, **asking).past_key_values) is type(expected)


def test_a_capture_that_is_cut_short_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1,))
    capture, errors = runner.StaticPrefill._capture, [ValueError("cut short")]

    def once_in_vain(path: Any, graph: Any) -> None:
        if errors:
            raise errors.pop()
        capture(path, graph)

    monkeypatch.setattr(runner.StaticPrefill, "_capture", once_in_vain)
    with fast(model, schedule_for(model, *STAGES)) as record:
        with pytest.raises(ValueError, match="cut short"):
            generate(model, inputs)
        generate(model, inputs)
    assert (record.captures, record.fast_prefills) == (1, 1)


def test_the_model_is_left_as_it_was() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1,))
    text = find_backbone(model).text_model
    before = dict(vars(text))
    _, logits = generate(model, inputs)
    with fast(model, schedule_for(model, *STAGES)):
        generate(model, inputs)
        assert "forward" in vars(text)
    assert vars(text).keys() == before.keys()
    assert torch.equal(generate(model, inputs)[1], logits)


def test_timing_counts_the_decoder() -> None:
    tiny = FAMILIES["llava"]
    model = tiny.build()
    with fast(model, schedule_for(model, *STAGES), timing=True) as record:
        generate(model, tiny.batch((1,)))
    assert record.milliseconds.keys() == {"prefill", "decode"}
    assert all(value > 0 for value in record.milliseconds.values())


def as_if_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static runs find what they would while a graph is captured: transformers then looks at no mask."""
    run = Graph._run

    def captured(graph: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            return run(graph)

    monkeypatch.setattr(Graph, "_run", captured)


@pytest.mark.parametrize("fields", [{}, {"dropped_tokens": "merge"}, {"positions": "renumbered"}])
@pytest.mark.parametrize("name", [name for name in FAMILY_CASES if name not in PLAIN_ONLY])
def test_a_capture_reads_nothing_on_the_host(
    name: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches, extra = family_and_options(name)
    inputs = batches[ROWS]
    options = {"vision_mask": exactness_b.given_mask(extra["given"], inputs)} if extra else {}
    as_if_captured(monkeypatch)
    with (
        torch.no_grad(),
        fast(model, schedule_for(model, (-1, 0.7), *STAGES, **fields), **options) as record,
        host_reads(model) as counts,
    ):
        model(**inputs)
    assert record.fast_prefills == 1
    reads = [read for phase, read in counts if phase == "decoder"]
    assert bool(reads) is (name in READ_BY_THEIR_EXPERTS)


@pytest.mark.parametrize("name", FAMILIES)
def test_warm_ups_run_what_a_capture_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have a mask, too, where nothing is padded; and leave the prompt as it was."""
    tiny = FAMILIES[name]
    model = tiny.build()
    layer = find_backbone(model).layers[0]
    inputs = next(
        batch
        for batch in (tiny.batch((1,), text=(words,)) for words in range(9, 40))
        if batch["input_ids"].shape[1] % 8 == 0
    )
    masked: list[bool] = []

    def capture(_path: Any, graph: Any) -> None:
        hook = layer.register_forward_pre_hook(
            lambda _module, _args, kwargs: masked.append(kwargs["attention_mask"] is not None),
            with_kwargs=True,
        )
        graph.warm_up()
        hook.remove()

    monkeypatch.setattr(runner.StaticPrefill, "_capture", capture)
    schedule = schedule_for(model, *STAGES)
    with fast(model, schedule):
        _, found = generate(model, inputs)
    assert masked == [True] * WARM_UPS
    with pruned(model, schedule):
        _, expected = generate(model, inputs)
    assert (found - expected).abs().max() < rounding_bound(model, inputs)


class _Constants(TorchFunctionMode):
    """Counts tensors made from Python values, which a GPU gets by a copy that a capture cannot wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += func in (torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fields", [{}, {"dropped_tokens": "merge"}, {"positions": "renumbered"}])
@pytest.mark.parametrize("first", [-1, 0])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_decoder_takes_nothing_from_the_host(
    name: str, first: int, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = FAMILIES[name]
    model, inputs = tiny.build(), tiny.batch(ROWS)
    run, constants = Graph._run, _Constants()

    def counted(graph: Any) -> Any:
        with constants:
            return run(graph)

    monkeypatch.setattr(Graph, "_run", counted)
    with torch.inference_mode(), fast(model, schedule_for(model, (first, 0.5), (2, 0.2), **fields)) as record:
        model(**inputs)
        with constants:
            torch.tensor([1])
    assert record.fast_prefills == 1
    assert constants.made == 1  # the one that shows that they are counted
