"""Scorers of other packages, found by their entry point."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pruning_runtime.scorers import ENTRY_POINTS

MODULE = """
from pruning_runtime.scorers import PositionScorer

class Reversed(PositionScorer):
    name = "reversed"

    def score_positions(self, vision, position, keep, forward):
        return -position.float()

class Misnamed(Reversed):
    name = "other"
"""
REGISTERED = f"""[{ENTRY_POINTS}]
reversed = someone:Reversed
misnamed = someone:Misnamed
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder as an installed package leaves it."""
    (tmp_path / "someone.py").write_text(MODULE)
    info = tmp_path / "someone-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: someone\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(REGISTERED)
    return tmp_path


def said(package: Path, code: str) -> str:
    """What a process prints that has the package on its path."""
    text = f"import sys; sys.path.append({str(package)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_a_schedule_names_a_registered_scorer_like_ours(package: Path) -> None:
    code = """
from pruning_runtime.schedule import ScorerChoice
from pruning_runtime.scorers import make_scorer
ScorerChoice(name="reversed")
print(type(make_scorer("reversed")).__module__)
"""
    assert said(package, code).strip() == "someone"


def test_an_unknown_scorer_is_refused_with_all_names(package: Path) -> None:
    code = "from pruning_runtime.scorers import make_scorer; make_scorer('nobody')"
    last = said(package, code).strip().splitlines()[-1]
    assert "unknown scorer 'nobody'" in last
    assert "reversed" in last
    assert "divprune" in last


def test_a_registered_object_with_another_name_is_refused(package: Path) -> None:
    code = "from pruning_runtime.scorers import make_scorer; make_scorer('misnamed')"
    last = said(package, code).strip().splitlines()[-1]
    assert "scorer 'misnamed' of the entry point 'someone:Misnamed'" in last
