"""What a profile's facts must be before anything is computed from them."""

from __future__ import annotations

import pytest

from schedule_finder.run.schema import problem_of_meta, problem_of_searched


def test_layers_that_rise_from_0_are_fine() -> None:
    assert problem_of_meta({"layers": [0, 3, 7]}) is None
    assert problem_of_meta({}) is None


@pytest.mark.parametrize("layers", [[1, 0], [0, 0, 1], [-1, 0]])
def test_layers_in_another_order_are_refused(layers: list[int]) -> None:
    assert problem_of_meta({"layers": layers}) == "`layers`: must be layer numbers in rising order"


def test_a_size_that_no_decoder_has_is_refused() -> None:
    """A misspelled size would else leave the real one at its default."""
    shape = {"num_layers": 2, "hidden_size": 8, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4}
    shape |= {"intermediate_size": 16, "vocab_size": 30}
    meta = {
        "backbone": {"name": "tiny", "model_type": "llava", "num_layers": 2},
        "shape": shape,
        "layers": [0, 1],
        "dtype": "float32",
        "prompt_digest": "sha256:0",
        "left_out": {},
    }
    assert problem_of_searched(meta) is None
    meta["shape"] = shape | {"linear_flops ": None}
    assert problem_of_searched(meta) == "`shape`: no such size: linear_flops "
