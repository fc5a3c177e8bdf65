"""Data files in the forms that people have, through `profile`: what the samples become."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.command_line import call
from tests.support.tiny_folder import write_jsonl, write_llava_folder

ROWS = 10


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("formats")
    return {
        "checkpoint": write_llava_folder(folder / "llava"),
        "images": write_jsonl(folder / "data", ROWS).parent,
    }


def samples_of(made: dict[str, Path], data: Path, out: Path) -> list[dict[str, Any]]:
    """Profile a data file; the entries of all samples, by row."""
    found = call(
        "profile", made["checkpoint"], "--dataset", data, "--samples", 8, "--eval-samples", 2, "--out", out
    )
    assert (found["done"], found["skipped"]) == (8, 0)
    entries = [json.loads(line) for line in (out / "1_samples.jsonl").read_text().splitlines()]
    return sorted(
        (entry for entry in entries if entry["use"] == "calibration"), key=lambda entry: entry["row"]
    )


def write_lines(path: Path, row: Callable[[int], dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(ROWS)))
    return path


def llava(number: int) -> dict[str, Any]:
    return {
        "id": str(number),
        "image": f"images/{number}.png",
        "conversations": [
            {"from": "human", "value": f"<image>\nwhat is word{number + 20} ?"},
            {"from": "gpt", "value": f"red {number}"},
            {"from": "human", "value": "and this ?"},
            {"from": "gpt", "value": "blue"},
        ],
    }


def chat(number: int, image: dict[str, Any], **more: Any) -> dict[str, Any]:
    question = [{"type": "image", **image}, {"type": "text", "text": f"what is word{number + 20} ?"}]
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": f"red {number}"}]},
        ],
        **more,
    }


def chat_with_text(number: int) -> dict[str, Any]:
    """Contents that are text, and images in a column of their own."""
    return {
        "messages": [
            {"role": "user", "content": f"<image>what is word{number + 20} ?"},
            {"role": "assistant", "content": f"red {number}"},
        ],
        "images": [f"images/{number}.png"],
    }


def encoded(made: dict[str, Path], number: int) -> dict[str, Any]:
    data = base64.b64encode((made["images"] / "images" / f"{number}.png").read_bytes()).decode()
    return {"image_url": {"url": f"data:image/png;base64,{data}"}}


@pytest.mark.parametrize("form", ["llava", "path in the message", "column", "text", "base64", "plain"])
def test_questions_answers_and_images_of_dialogs(made: dict[str, Path], tmp_path: Path, form: str) -> None:
    rows: dict[str, Callable[[int], dict[str, Any]]] = {
        "llava": llava,
        "path in the message": lambda n: chat(n, {"image": f"images/{n}.png"}),
        "column": lambda n: chat(n, {}, images=[f"images/{n}.png"]),
        "text": chat_with_text,
        "base64": lambda n: chat(n, encoded(made, n)),
        "plain": lambda n: {
            "image": f"images/{n}.png", "question": f"<image> what is word{n + 20} ?", "answer": f"red {n}"
        },
    }  # fmt: skip
    data = write_lines(made["images"] / f"{form.replace(' ', '-')}.jsonl", rows[form])
    for entry in samples_of(made, data, tmp_path / "run"):
        assert entry["question"] == f"what is word{entry['row'] + 20} ?"
        assert entry["answer"] == f"red {entry['row']}"


@pytest.mark.parametrize("answer", ["number", "letter", "text"])
def test_lists_of_choices_become_letters(made: dict[str, Path], tmp_path: Path, answer: str) -> None:
    colours = ["red", "green", "blue"]
    answers: dict[str, Callable[[int], Any]] = {
        "number": lambda n: n % 3,
        "letter": lambda n: "ABC"[n % 3],
        "text": lambda n: colours[n % 3],
    }
    data = write_lines(
        made["images"] / f"choices-{answer}.jsonl",
        lambda n: {
            "image": f"images/{n}.png", "question": "what is this ?", "choices": colours, "answer": answers[answer](n)
        },
    )  # fmt: skip
    for entry in samples_of(made, data, tmp_path / "run"):
        assert entry["question"].splitlines()[:4] == ["what is this ?", "A. red", "B. green", "C. blue"]
        assert entry["answer"] == "ABC"[entry["row"] % 3]


@pytest.mark.parametrize("form", ["binary", "struct", "list"])
def test_parquet_with_image_bytes(made: dict[str, Path], tmp_path: Path, form: str) -> None:
    images = [(made["images"] / "images" / f"{n}.png").read_bytes() for n in range(ROWS)]
    cells = {
        "binary": images,
        "struct": [{"bytes": image, "path": None} for image in images],
        "list": [[image] for image in images],
    }
    table = pa.table({"image": cells[form], "question": ["what is this ?"] * ROWS, "answer": ["red"] * ROWS})
    pq.write_table(table, tmp_path / "data.parquet")
    assert len(samples_of(made, tmp_path / "data.parquet", tmp_path / "run")) == 8


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_tar_files(made: dict[str, Path], tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(ROWS):
            image = (made["images"] / "images" / f"{number}.png").read_bytes()
            text = json.dumps(
                {"question": f"what is word{number + 20} ?", "answer": f"red {number}"}
            ).encode()
            for suffix, content in (("png", image), ("json", text)):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    out = tmp_path / "run"
    arguments = (
        "profile",
        made["checkpoint"],
        "--dataset",
        path,
        "--samples",
        6,
        "--eval-samples",
        2,
        "--out",
        out,
    )
    assert call(*arguments, *(["--streaming"] if streaming else []))["done"] == 6
    for entry in map(json.loads, (out / "1_samples.jsonl").read_text().splitlines()):
        if entry["use"] == "calibration":
            assert entry["question"] == f"what is word{entry['row'] + 20} ?"
            assert entry["answer"] == f"red {entry['row']}"
