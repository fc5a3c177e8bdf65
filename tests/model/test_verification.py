"""`inspect --verify`: exactness on a user's checkpoint, and that a wrong runtime would be noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pruning_runtime import decode
from pruning_runtime.prefill import Prefill
from pruning_runtime.scorers import SCORERS
from schedule_finder.errors import InputError
from schedule_finder.models.load_options import LoadOptions
from schedule_finder.models.loading import LoadedBackbone, load_backbone
from schedule_finder.verification import Verification, verify
from tests.support.command_line import call
from tests.support.tiny_folder import write_llava_folder, write_qwen2_vl_folder

SOME = ("text_guided", "divprune", "strided", "evs", "visionzip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_folder(tmp_path_factory.mktemp("verify") / "llava")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedBackbone:
    return load_backbone(str(folder), device="cpu")


def by_name(found: Verification) -> dict[str, Any]:
    return {check.scorer: check for check in found.checks}


def test_a_stock_checkpoint_is_exact(loaded: LoadedBackbone) -> None:
    seen: list[tuple[int, int]] = []
    found = verify(loaded, SOME, lambda *done: seen.append(done))
    checks = by_name(found)
    assert found.verdict == "exact"
    assert seen[-1] == (len(SOME), len(SOME))
    assert checks["keep all"].difference == 0.0
    for name in ("text_guided", "divprune", "strided"):
        assert checks[name].result == "exact"
        assert checks[name].difference <= found.bound < 1e-3
        assert checks[name].pruning > 20 * found.bound
    assert checks["evs"].result == "refused"
    assert "whole frames" in checks["evs"].reason
    assert checks["visionzip"].result == "not compared"


def test_families_that_count_their_own_positions(tmp_path: Path) -> None:
    qwen = load_backbone(str(write_qwen2_vl_folder(tmp_path / "qwen")), device="cpu")
    assert verify(qwen, ("text_guided", "divprune")).verdict == "exact"


def test_a_wrong_mask_at_generated_tokens_is_noticed(
    loaded: LoadedBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generated tokens that lose sight of a kept key differ from the reference."""
    before = decode.Continuation.before_layer

    def wrong(self: Any, layer: int, hidden: Any, others: Any, kwargs: dict[str, Any]) -> Any:
        return before(self, layer, hidden * 1.01, others, kwargs)

    def nudged(self: Any, layer: int, hidden: Any, others: Any, kwargs: dict[str, Any]) -> Any:
        found = wrong(self, layer, hidden, others, kwargs)
        return found or (hidden * 1.01, others, kwargs)

    monkeypatch.setattr(decode.Continuation, "before_layer", nudged)
    found = verify(loaded, ("strided",))
    assert found.verdict == "differs"
    assert by_name(found)["strided"].difference > 10 * found.bound


def test_a_token_that_should_have_left_is_noticed(
    loaded: LoadedBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Prefill.before_layer

    def late(self: Any, layer: int, hidden: Any, others: Any, kwargs: dict[str, Any]) -> Any:
        found = before(self, layer, hidden, others, kwargs)
        return found if found is None else (found[0] + 0.01 * found[0].roll(1, -2), *found[1:])

    monkeypatch.setattr(Prefill, "before_layer", late)
    assert verify(loaded, ("strided",)).verdict == "differs"


def test_half_precision_is_not_called_exact_without_evidence(folder: Path) -> None:
    half = load_backbone(str(folder), device="cpu", dtype="bfloat16")
    found = verify(half, ("strided",))
    assert found.dtype == "bfloat16"
    assert found.bound > 1e-3
    assert found.verdict in ("exact", "inconclusive")
    check = by_name(found)["strided"]
    assert (check.result == "exact") == (check.pruning >= 20 * found.bound)


def test_what_masking_cannot_check_is_refused(
    loaded: LoadedBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        loaded.backbone.text_model.config, "_attn_implementation_internal", "flash_attention_2"
    )
    with pytest.raises(InputError, match="--attn-implementation sdpa"):
        verify(loaded, ())


def test_the_command_prints_a_row_per_scorer_and_a_verdict(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = call("inspect", "--verify", folder)
    assert done["verdict"] == "exact"
    assert not done["failed"]
    assert [check["scorer"] for check in done["checks"]] == ["keep all", *SCORERS]


def test_a_backbone_that_differs_fails_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from schedule_finder import verification
    from schedule_finder.cli.commands import app

    monkeypatch.setattr(verification, "masked_logits", lambda *args: torch.zeros(2, 3, 1))
    result = CliRunner().invoke(app, ["inspect", "--verify", str(folder)])
    assert result.exit_code == 1
    assert "verdict: differs, pruning this backbone is NOT exact" in result.stdout


def test_only_backbones_are_verified(tmp_path: Path) -> None:
    assert "is no backbone" in call("inspect", "--verify", "fastv/llava-1.5-7b", code=2)


def test_load_options_are_used(folder: Path) -> None:
    eager = load_backbone(str(folder), device="cpu", options=LoadOptions(attn_implementation="eager"))
    assert verify(eager, ("text_guided",)).verdict == "exact"
