"""Options of a checkpoint: what they change, and that every step of a run uses them again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from schedule_finder.profiling.store import ProfileStore
from tests.support.command_line import call
from tests.support.tiny_folder import write_jsonl, write_llava_folder, write_qwen2_vl_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loading")
    return {
        "qwen": write_qwen2_vl_folder(folder / "qwen"),
        "llava": write_llava_folder(folder / "llava"),
        "data": write_jsonl(folder / "data", 12, sizes=True),
    }


def profile(made: dict[str, Path], name: str, out: Path, *more: Any, code: int = 0) -> Any:
    return call(
        "profile", made[name], "--dataset", made["data"], "--samples", 8, "--eval-samples", 2, "--out", out, *more, code=code
    )  # fmt: skip


def tokens(out: Path) -> tuple[float, float]:
    """Mean numbers of vision tokens and of other tokens."""
    found = ProfileStore(out / "2_profile").read()
    return found.mean_vision, found.mean_other


def test_pixels_change_the_number_of_tokens_in_every_step(made: dict[str, Path], tmp_path: Path) -> None:
    profile(made, "qwen", tmp_path / "plain")
    few, named = tmp_path / "few", tmp_path / "named"
    profile(made, "qwen", few, "--max-pixels", 256)
    profile(made, "qwen", named, "--processor-arg", "max_pixels=256")
    assert tokens(few)[0] < tokens(tmp_path / "plain")[0]
    assert tokens(few) == tokens(named)
    assert json.loads((few / "run.json").read_text())["options"]["loading"] == {
        "processor_args": {"max_pixels": 256}
    }
    # The prompts of other steps must be those of the profile: other options are another run.
    assert "another loading" in profile(made, "qwen", few, code=2)
    call("detect", few)
    call("schedule", few, "--budget", "60%")
    provenance = json.loads((few / "4_schedule.json").read_text())["provenance"]
    assert provenance["loading"] == {"processor_args": {"max_pixels": 256}}
    call("evaluate", few, "--max-new-tokens", 1, "--baselines", "none")
    assert "has no argument 'max_pixels'" in profile(
        made, "llava", tmp_path / "llava", "--max-pixels", 64, code=2
    )


def test_a_system_prompt_is_part_of_every_prompt(made: dict[str, Path], tmp_path: Path) -> None:
    template = made["qwen"] / "chat_template.jinja"
    before = template.read_text()
    template.write_text(
        before.replace("messages[0]['content']", "(messages | map(attribute='content') | sum(start=[]))")
    )
    try:
        profile(made, "qwen", tmp_path / "plain")
        profile(made, "qwen", tmp_path / "long", "--system-prompt", "what is this ?")
    finally:
        template.write_text(before)
    assert tokens(tmp_path / "long")[1] == tokens(tmp_path / "plain")[1] + 4
    metas = [ProfileStore(tmp_path / name / "2_profile").meta() for name in ("plain", "long")]
    assert metas[0]["prompt_digest"] != metas[1]["prompt_digest"]


def test_the_attention_kernel_is_the_one_asked_for(made: dict[str, Path]) -> None:
    assert call("inspect", made["llava"])["attention"] == "sdpa"
    assert call("inspect", made["llava"], "--attn-implementation", "eager")["attention"] == "eager"


def test_code_of_a_checkpoint_runs_only_where_it_is_allowed_each_time(
    made: dict[str, Path], tmp_path: Path
) -> None:
    """The code leaves a file beside itself when it is imported."""
    checkpoint = shutil.copytree(made["llava"], tmp_path / "llava")
    trace = tmp_path / "imported"
    (checkpoint / "modeling_own.py").write_text(
        "from transformers import LlavaForConditionalGeneration\n"
        "from .configuration_own import OwnConfig\n"
        "class Own(LlavaForConditionalGeneration):\n    config_class = OwnConfig\n"
        f"open({str(trace)!r}, 'a').write('x')\n"
    )
    path = checkpoint / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "llava_of_own"}
    (checkpoint / "configuration_own.py").write_text(
        f"from transformers import LlavaConfig\nopen({str(trace)!r}, 'a').write('x')\n"
        "class OwnConfig(LlavaConfig):\n    model_type = 'llava_of_own'\n"
    )
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForImageTextToText": "modeling_own.Own",
    }
    path.write_text(json.dumps(config))
    # The mapping of names that transformers applies to a `llava` checkpoint does not cover another model_type.
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("language_model.lm_head.weight")
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    made = made | {"own": checkpoint}
    assert "--trust-remote-code runs it" in profile(made, "own", tmp_path / "run", code=2)
    assert not trace.exists()
    found = profile(made, "own", tmp_path / "run", "--trust-remote-code")
    assert found["done"] == 8
    assert trace.exists()
    trace.unlink()
    call("detect", tmp_path / "run")
    assert "give the option again" in call("schedule", tmp_path / "run", code=2)
    assert not trace.exists()
