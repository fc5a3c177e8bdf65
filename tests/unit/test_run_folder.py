"""One process at a time works on a run; its files are read typed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from schedule_finder.errors import InputError
from schedule_finder.run.folder import Run
from schedule_finder.run.reader import read_change_points

ROOT = Path(__file__).parents[2]
HOLDS = """
import sys, time
import tests.conftest  # torchvision beside a CPU build of torch
from pathlib import Path
from schedule_finder.run.folder import Run
with Run(Path(sys.argv[1])).step("profile"):
    print("begun", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_has_gone(tmp_path: Path) -> None:
    run = Run.begin(tmp_path / "run", "run", {})
    command = [sys.executable, "-c", HOLDS, str(run.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "begun\n"
        before = run.path.read_text()
        with pytest.raises(InputError, match="another process is working on this run"), run.step("profile"):
            pass
        assert run.path.read_text() == before
        holder.send_signal(signal.SIGKILL)
    with run.step("profile"):
        pass
    assert run.document()["steps"]["profile"]["state"] == "done"


def test_a_failed_step_lets_go(tmp_path: Path) -> None:
    run = Run.begin(tmp_path / "run", "run", {})
    with pytest.raises(ZeroDivisionError), run.step("detect"):
        1 / 0  # noqa: B018
    assert run.document()["steps"]["detect"]["state"] == "failed"
    with run.step("detect"):
        pass


def test_change_points_by_detector(tmp_path: Path) -> None:
    path = tmp_path / "3_change_points.json"
    path.write_text(
        '{"default": "a", "samples": 4, "layers": [1, 3, 5], "detectors": {"a": {"change_points": [3], "evidence":'
        ' {"level": 0.9}}, "b": {"change_points": []}}}'
    )
    found = read_change_points(path)
    assert (found.of(), found.of("a"), found.of("b"), found.layers) == ([3], [3], [], [1, 3, 5])
    assert found.detectors["a"].evidence == {"level": 0.9}
    assert found.model_dump()["samples"] == 4
    with pytest.raises(InputError, match=r"no change points of detector 'c' \(there: a, b\)"):
        found.of("c")


def test_change_points_under_an_old_detector_name_and_with_support(tmp_path: Path) -> None:
    path = tmp_path / "3_change_points.json"
    layer = {"layer": 7, "distance": 0.3, "shared": 0.1, "nearest": 6, "nearest_distance": 0.2}
    found = {
        "change_points": [3, 9],
        "used": [3],
        "isolated_layers": [layer | {"support": 0.95}, layer | {"layer": 8, "support": 0.6}],
    }
    path.write_text(json.dumps({"default": "distribution_shift", "detectors": {"distribution_shift": found}}))
    read = read_change_points(path)
    assert read.default == "attention_shift"
    assert read.of() == read.of("distribution_shift") == [3]
    assert read.isolated == [7]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not readable"),
        ("[]", "holds no JSON object"),
        ('{"default": "a"}', "no detectors in it"),
        ('{"default": "a", "detectors": {}}', "no detector 'a'"),
        ('{"default": "a", "detectors": {"a": {}}}', r"no detectors\.a\.change_points in it"),
        ('{"default": "a", "detectors": {"a": {"change_points": ["x"]}}}', r"change_points\.0: .*integer"),
    ],
)
def test_a_broken_change_point_file(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "3_change_points.json"
    with pytest.raises(InputError, match="not there; run `adaptinfer-profile detect"):
        read_change_points(path)
    path.write_text(text)
    with pytest.raises(InputError, match=rf"3_change_points\.json: .*{reason}.*detect again"):
        read_change_points(path)
