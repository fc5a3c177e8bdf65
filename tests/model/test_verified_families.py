"""The table that `adaptinfer-profile backbones` prints is what the tests run over."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

from pruning_runtime import find_backbone
from schedule_finder.cli.commands import app
from schedule_finder.models.verified_families import VERIFIED
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import FAMILIES

TESTED: dict[str, Any] = {**FAMILIES, **FAMILIES_A, **FAMILIES_B}


def test_every_tested_family_is_listed_and_no_other() -> None:
    assert list(VERIFIED) == list(TESTED)


@pytest.mark.parametrize("key", VERIFIED)
def test_a_row_says_what_the_instance_is(key: str) -> None:
    row, tiny = VERIFIED[key], TESTED[key]
    if not hasattr(transformers, row.model_class):
        assert row.since == "5.23"
        pytest.skip(f"transformers {transformers.__version__} has no {row.model_class}")
    model = tiny.build()
    backbone = find_backbone(model)
    assert type(model).__name__ == row.model_class
    assert dict(model.named_modules())[row.layers] is backbone.layers
    assert set(row.kinds) == set(backbone.layer_kinds)
    assert row.media == getattr(tiny, "modalities", ("image",))


def test_the_command_prints_the_table() -> None:
    result = CliRunner().invoke(app, ["backbones", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout.strip().splitlines()[-1])
    assert list(printed) == list(VERIFIED)
    assert printed["qwen3_5"]["reference"] == "compaction"
    assert printed["llava"]["reference"] == "masking"
    assert "Verified families" in result.stdout
