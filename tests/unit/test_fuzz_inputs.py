"""Broken input through the real command line: seeded cases, and one test for each defect that they found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.fuzz_inputs import KINDS, Case, fuzz, make_base, run_case
from tests.support.command_line import call

CASES = 120


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run of the demo; not to be changed."""
    return make_base(tmp_path_factory.mktemp("fuzz") / "base")


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return shutil.copytree(base, tmp_path / "run")


def test_broken_input_is_refused_in_one_line_and_no_file_is_lost(base: Path, tmp_path: Path) -> None:
    found = fuzz(tmp_path, range(CASES), seed=2, base=base)
    assert found.defects == []
    assert {kind for kind, code in found.counts if code == 2} == set(KINDS)
    assert sum(found.counts.values()) == CASES


def test_a_case_depends_on_its_number_only(base: Path, tmp_path: Path) -> None:
    for kind, make in KINDS.items():
        made = []
        for name in ("a", "b"):
            (work := tmp_path / kind / name).mkdir(parents=True)
            arguments = make(np.random.default_rng([1, 7]), base, work)
            made.append([text.replace(str(work), "") for text in arguments])
        assert made[0] == made[1]


def test_the_script_notices_a_lost_file_and_a_wrong_exit_code(run: Path, tmp_path: Path) -> None:
    """``detect`` writes its result, which is lost for a command that may not write; ``--debug`` lets exceptions out."""
    (run / "3_change_points.json").unlink()
    code, problems = run_case(Case("run", ["detect", str(run)], tmp_path))
    assert (code, problems) == (0, [])
    (run / "3_change_points.json").write_text("{}")
    broken = Case("run", ["schedule", str(run), "--no-model", "--solver", "retained", "--debug"], tmp_path)
    _, problems = run_case(broken)
    assert ["traceback" in problem for problem in problems] == [True]


# ---- defects that the script found


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("1_samples.jsonl", ("evaluate", "--baselines", "none")),
        ("3_change_points.json", ("detect",)),
    ],
)
def test_a_folder_where_a_file_belongs_is_one_line(run: Path, file: str, command: tuple[str, ...]) -> None:
    (run / file).unlink()
    (run / file).mkdir()
    name, *options = command
    line = call(name, run, *options, code=2)
    assert file in line
    assert "irectory" in line


def test_a_summary_that_is_no_text_is_one_line(run: Path) -> None:
    (run / "5_evaluation.json").write_bytes(b"\x89PNG")
    assert "5_evaluation.json" in call("inspect", run, code=2)


@pytest.mark.parametrize(
    ("file", "keys", "value"),
    [
        ("2_profile/meta.json", ("backbone", "model_type"), {"x": None}),
        ("2_profile/meta.json", ("shape", "num_kv_heads"), {"x": None}),
        ("2_profile/meta.json", ("shape", "vocab_size"), ...),
        ("2_profile/meta.json", ("shape", "num_layers"), 11),
        ("2_profile/meta.json", ("layers",), [[]]),
        ("2_profile/meta.json", ("dtype",), ...),
        ("2_profile/manifest.json", ("shards", "part-00000.parquet", "bytes"), ...),
        ("run.json", ("options",), []),
        ("run.json", ("options", "seed"), ...),
        ("run.json", ("options", "seed"), "x"),
        ("run.json", ("steps",), ...),
        ("run.json", ("steps", "detect"), 1),
    ],
)
def test_a_wrong_value_in_a_file_of_the_run_is_named(
    run: Path, file: str, keys: tuple[str, ...], value: object
) -> None:
    """``...`` removes the field."""
    document = json.loads((run / file).read_text())
    parent = document
    for key in keys[:-1]:
        parent = parent[key]
    if value is ...:
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = value
    (run / file).write_text(json.dumps(document))
    line = call("schedule", run, "--no-model", "--solver", "retained", code=2)
    assert Path(file).name in line
    assert keys[-1] in line


@pytest.mark.parametrize("cells", ["1,2\n", "1," * 60 + "\n", "\xff"])
def test_an_evaluation_that_is_no_table_is_one_line(run: Path, cells: str) -> None:
    path = run / "5_evaluation.csv"
    path.write_bytes(path.read_bytes() + cells.encode("latin-1"))
    assert "5_evaluation.csv" in call("inspect", run, code=2)


@pytest.mark.parametrize("row", [0, 20])
def test_a_question_that_is_no_text_is_refused_or_skipped(tmp_path: Path, row: int) -> None:
    """The first rows identify the data set; a later one is skipped as a sample."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    lines = [b'{"image": "a.png", "question": "what is here ?", "answer": "red"}'] * 24
    lines[row] = lines[row].replace(b"here ?", b"here \xd2")
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\n".join(lines) + b"\n")
    asked = (
        "profile",
        "demo",
        "--dataset",
        data,
        "--samples",
        24,
        "--eval-samples",
        0,
        "--out",
        tmp_path / "run",
    )
    if row == 0:
        assert "cannot be read: 'utf-8'" in call(*asked, code=2)
    else:
        assert call(*asked)["skipped"] == 1
