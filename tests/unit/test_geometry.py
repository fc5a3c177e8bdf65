"""The decoder's geometry, where the configuration does not state all of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruning_runtime import find_backbone
from pruning_runtime.costs import pre_decoder_share, prefill_flops
from pruning_runtime.geometry import DecoderShape
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import FAMILIES, LAYERS


def test_a_configuration_without_an_intermediate_size() -> None:
    """Qwen3.5-MoE states the width of its experts only."""
    model = FAMILIES_A["qwen3_5_moe"].build()
    config = model.config.get_text_config()
    del config.intermediate_size  # as in the published configuration
    shape = find_backbone(model).shape
    # Two active experts and a shared one, 32 wide each; a router for 4 and a gate for the shared one add 5 maps.
    assert shape.intermediate_size == round((3 * 3 * 48 * 32 + 5 * 48) / (3 * 48))


def test_without_gate_the_mlp_has_two_maps() -> None:
    """A layer with a plain MLP is charged for what it has, not for a gated one."""
    model = FAMILIES["llava"].build()
    backbone = find_backbone(model)
    gated = backbone.shape.linear_flops
    for layer in backbone.layers:
        layer.mlp = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 48))
    plain = find_backbone(model).shape.linear_flops
    assert gated is not None
    assert plain is not None
    assert [a - b for a, b in zip(gated, plain, strict=True)] == [2 * 48 * 64] * LAYERS


def test_flops_take_no_part_in_the_digest() -> None:
    """Schedules keep their digest when the counting of FLOPs changes."""
    backbone = find_backbone(FAMILIES_B["gemma4_large"].build())
    sizes = backbone.shape.sizes
    assert set(sizes) <= {
        *("num_layers", "hidden_size", "num_heads", "num_kv_heads"),
        *("head_dim", "intermediate_size", "vocab_size", "value_dim"),
    }
    digest = find_backbone(FAMILIES["llava"].build()).config_digest
    assert digest == "sha256:fb77927fc1d06655206749040e664918887a7708b59cb55c4b80e8bbde470585"


def test_a_shape_from_an_old_profile_has_no_flops_of_its_own() -> None:
    """Profiles store the shape as JSON; those of earlier releases hold the sizes alone."""
    sizes = find_backbone(FAMILIES["llava"].build()).shape.sizes
    old = DecoderShape(**sizes)
    now = find_backbone(FAMILIES["llava"].build()).shape
    assert old.linear_flops is None
    tokens = [float(count) for count in range(20, 20 + LAYERS)]
    assert prefill_flops(old, tokens) == prefill_flops(now, tokens)
    assert pre_decoder_share(old) == pre_decoder_share(now)
    listed = DecoderShape(**sizes, linear_flops=list(now.linear_flops or ()), pair_flops=[1] * LAYERS)  # type: ignore[arg-type]
    assert listed.linear_flops == now.linear_flops
    assert hash(listed) is not None


@pytest.mark.parametrize("name", ["linear_flops", "pair_flops"])
def test_a_damaged_shape_without_an_entry_for_every_layer_is_refused(name: str) -> None:
    sizes = find_backbone(FAMILIES["llava"].build()).shape.sizes
    with pytest.raises(ValueError, match=f"{name} has {LAYERS - 1} entries, num_layers is {LAYERS}"):
        DecoderShape(**sizes, **{name: (1,) * (LAYERS - 1)})  # type: ignore[arg-type]


def test_layers_of_unlike_shape_are_charged_one_by_one() -> None:
    """Gemma 4's full layers have wider heads; tokens dropped there save more."""
    shape = find_backbone(FAMILIES_B["gemma4_own_keys"].build()).shape
    many, few = 40.0, 10.0
    wide = prefill_flops(shape, [many if layer % 2 else few for layer in range(LAYERS)])
    narrow = prefill_flops(shape, [few if layer % 2 else many for layer in range(LAYERS)])
    assert wide > 1.2 * narrow


def test_recurrent_layers_have_no_pairs() -> None:
    shape = find_backbone(FAMILIES_A["qwen3_5"].build()).shape
    assert shape.pair_flops is not None
    assert [flops > 0 for flops in shape.pair_flops] == [False, True] * (LAYERS // 2)


def test_weights_need_not_be_there() -> None:
    """Geometry is read from shapes alone, so that a checkpoint can be described before it is loaded."""
    model = FAMILIES["llava"].build()
    expected = find_backbone(model).shape
    assert find_backbone(model.to(torch.device("meta"))).shape == expected


@pytest.mark.parametrize("tokens", [[7.0], [3.0, 0.0, 3.0]])
def test_a_list_of_another_length_stands_for_mean_layers(tokens: list[float]) -> None:
    shape = find_backbone(FAMILIES_B["llama4"].build()).shape
    whole = [sum(prefill_flops(shape, [count] * LAYERS) for count in tokens) / LAYERS]
    assert prefill_flops(shape, tokens) == pytest.approx(whole[0])
