"""One process at a time works on a run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from schedule_finder.errors import InputError
from schedule_finder.run.folder import Run

ROOT = Path(__file__).parents[2]
HOLDS = """
import sys, time
import tests.conftest  # torchvision beside a CPU build of torch
from pathlib import Path
from schedule_finder.run.folder import Run
with Run(Path(sys.argv[1])).step("profile"):
    print("begun", flush=True)
    time.sleep(60)
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
