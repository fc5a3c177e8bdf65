"""Every command and Python block of README, quick start, guide and tutorials runs, with few samples."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from schedule_finder.models.loading import LoadedBackbone, load_backbone
from schedule_finder.samples import Sample
from tests.support.command_line import call
from tests.support.documented import Command, commands, python_blocks
from tests.support.tiny_folder import write_jsonl, write_llava_folder

pytest.importorskip("altair", reason="the extra `report` is not installed")
pytestmark = pytest.mark.slow
SMALL = {"--samples": "24", "--eval-samples": "6"}
ELSEWHERE = ("evidence.md", "benchmarks.md", "new_family.md")
"""Pages whose commands need downloads, a GPU or hours; a unit test parses them."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A working directory as the pages assume it: a checkpoint, data, and a run of the demo."""
    folder = tmp_path_factory.mktemp("reader")
    before = Path.cwd()
    os.chdir(folder)
    write_llava_folder(Path("my-llava"))
    shutil.copytree("my-llava", "my-checkpoint")
    write_jsonl(Path(), 30)
    call("run", "demo", "--samples", 48, "--eval-samples", 12, "--out", "outputs/demo", "--baselines", "none")
    shutil.copy("outputs/demo/4_schedule.json", "other.json")
    yield folder
    os.chdir(before)


def small(command: Command) -> list[str]:
    """The command with few samples."""
    words = list(command.words)
    sizes = SMALL if words[:2] != ["run", "demo"] else {"--samples": "48", "--eval-samples": "12"}
    for option, value in sizes.items():
        if option in words:
            words[words.index(option) + 1] = value
        elif words[0] == "run":
            words += [option, value]
    return words


def test_every_command_of_a_reader_runs(place: Path) -> None:
    ran = []
    for command in commands():
        if command.page.endswith(ELSEWHERE):
            continue
        call(*small(command))
        ran.append(command.words[0])
    assert {"run", "schedule", "evaluate", "plot", "report", "inspect"} <= set(ran)
    assert (place / "comparison.html").exists()


def prompt(loaded: LoadedBackbone) -> dict[str, Any]:
    picture = Image.new("RGB", (112, 112), (200, 30, 30))
    return loaded.inputs([Sample("s", (picture,), "what is this ?", None)])


@pytest.mark.parametrize(
    ("page", "backbone"),
    [
        ("docs/index.md", "demo"),
        ("docs/tutorials/in_your_code.md", "my-llava"),
        ("docs/tutorials/serving.md", "my-llava"),
    ],
)
def test_the_python_of_a_page_runs(place: Path, page: str, backbone: str) -> None:
    """After the commands: the pages use their runs."""
    loaded = load_backbone(backbone, device="cpu")
    names: dict[str, Any] = {"model": loaded.backbone.model, "inputs": prompt(loaded)}
    blocks = python_blocks(page)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_the_python_of_the_guide_runs(place: Path) -> None:
    loaded = load_backbone("demo", device="cpu")
    names: dict[str, Any] = {"model": loaded.backbone.model}
    blocks = [block for block in python_blocks("docs/guide.md") if "user/" not in block]
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/guide.md", "exec"), names)
    assert {"method", "score"} <= set(names["table"].columns)
