"""The profile's numbers against eager attention, one sample and one head at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pruning_runtime import find_backbone
from schedule_finder.profiling.capture import CURVE_FIELDS, SCORE_FIELDS, ProfileError, profile_batch
from tests.support.eager_scores import eager_maps, expected_scores
from tests.support.tiny_models import FAMILIES


def entropy(values: np.ndarray) -> float:
    """Bits, of ``values`` normalised to sum to 1."""
    share = values / values.sum()
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [(1,), (2, 1, 1)])
def test_equal_to_eager_attention(family: str, attention: str, rows: tuple[int, ...]) -> None:
    tiny = FAMILIES[family]
    model, inputs = tiny.build(attention=attention), tiny.batch(rows)
    backbone = find_backbone(model)
    profile = profile_batch(backbone, inputs)
    vision = backbone.vision_mask(inputs["input_ids"])
    valid = inputs["attention_mask"].bool()
    maps = eager_maps(family, inputs)
    for layer, layer_maps in enumerate(maps):
        by_rule = {name: expected_scores(name, layer_maps, vision, valid) for name in SCORE_FIELDS}
        for row, found in enumerate(profile):
            seen = vision[row].numpy().nonzero()[0]
            others = [i for i in np.flatnonzero(valid[row]) if not vision[row, i]]
            text_queries = [i for i in others if i > seen[0]]
            assert (found.num_vision, found.num_text_queries, found.num_other) == (
                len(seen),
                len(text_queries),
                len(others),
            )
            heads = layer_maps.shape[1]
            for name in SCORE_FIELDS:
                scale = heads * len(text_queries) if name == "uniform_text" else 1
                expected = by_rule[name][row].numpy() / scale
                np.testing.assert_allclose(found.scores[name][layer], expected, atol=1e-5, rtol=1e-5)

            rows_of = layer_maps[row][:, text_queries].double().numpy()
            expected_curves = {
                "vision_mass": rows_of[:, :, seen].sum(2).mean(),
                "vision_entropy": np.mean(
                    [entropy(line) for line in rows_of[:, :, seen].reshape(-1, len(seen))]
                ),
            }
            assert set(expected_curves) == set(CURVE_FIELDS)
            for name, expected in expected_curves.items():
                assert found.curves[name][layer] == pytest.approx(expected, abs=1e-5), name


def test_the_model_runs_as_it_always_does() -> None:
    """Its own kernel, and nothing left behind."""
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1, 2))
    with torch.no_grad():
        before = model(**inputs).logits
    profile_batch(find_backbone(model), inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert model.get_decoder().config._attn_implementation == "sdpa"


_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,  # what a read is called in inference mode
    torch.ops.aten.nonzero.default,
)


class _Transfers(TorchDispatchMode):
    """Counts what would wait for a GPU: reads of a tensor's value, and copies to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):  # type: ignore[no-untyped-def]
        if func in _READS:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_probe_reads_nothing_back_layer_by_layer() -> None:
    """Reads do not grow with the number of layers: all that is kept moves in one transfer at the end."""
    tiny = FAMILIES["llava"]
    inputs = tiny.batch((1, 1))
    counts = []
    for layers in (4, 8):
        model = tiny.build(num_hidden_layers=layers)
        with _Transfers() as transfers:
            profile_batch(find_backbone(model), inputs)
        counts.append(transfers.count)
    assert counts[0] == counts[1]


def test_samples_without_an_image_or_without_text() -> None:
    tiny = FAMILIES["llava"]
    backbone = find_backbone(tiny.build())
    with pytest.raises(ProfileError, match="sample 1 .* no vision tokens"):
        profile_batch(backbone, tiny.batch((1, 0)))
    inputs = tiny.batch((1,))
    last_vision = int(backbone.vision_mask(inputs["input_ids"])[0].nonzero()[-1])
    cut = {name: inputs[name][:, : last_vision + 1] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ProfileError, match="no text after"):
        profile_batch(backbone, {**inputs, **cut})


def mean_deviation(most: int | None) -> dict[str, float]:
    """Mean relative deviation of scores and curves from those of all text queries, over layers and tokens."""
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1,), text=(300,))
    backbone = find_backbone(model)
    (exact,), (found,) = profile_batch(backbone, inputs), profile_batch(backbone, inputs, most)
    assert (found.num_text_queries, found.num_vision) == (exact.num_text_queries, exact.num_vision)
    np.testing.assert_allclose(found.scores["last_token"], exact.scores["last_token"], rtol=1e-5)
    pairs = [(name, found.scores[name], exact.scores[name]) for name in SCORE_FIELDS]
    pairs += [(name, found.curves[name], exact.curves[name]) for name in CURVE_FIELDS]
    return {name: float(np.abs(some / whole - 1).mean()) for name, some, whole in pairs}


def test_a_sample_of_the_text_queries_estimates_all_of_them() -> None:
    few, many = mean_deviation(16), mean_deviation(128)
    for name in ("uniform_text", "text_guided", *CURVE_FIELDS):
        assert many[name] < 0.05, name
        assert many[name] < 0.7 * few[name], name


def test_a_limit_above_the_text_changes_nothing() -> None:
    tiny = FAMILIES["llava"]
    backbone, inputs = find_backbone(tiny.build()), tiny.batch((2, 1, 1))
    for some, whole in zip(
        profile_batch(backbone, inputs, 10_000), profile_batch(backbone, inputs), strict=True
    ):
        for name in SCORE_FIELDS:
            np.testing.assert_array_equal(some.scores[name], whole.scores[name])
        for name in CURVE_FIELDS:
            np.testing.assert_array_equal(some.curves[name], whole.curves[name])


def test_a_short_text_beside_a_long_one_keeps_its_numbers() -> None:
    tiny = FAMILIES["llava"]
    backbone, inputs = find_backbone(tiny.build()), tiny.batch((1, 1), text=(6, 90))
    short = profile_batch(backbone, inputs, 20)[0]
    exact = profile_batch(backbone, inputs)[0]
    for name in SCORE_FIELDS:
        np.testing.assert_allclose(short.scores[name], exact.scores[name], rtol=1e-4, atol=1e-7)
